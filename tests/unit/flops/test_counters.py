"""Each counter sees what the other does, in ways to compute that people find."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifar import flops
from helpers.zoo import Net, rows, weight

Run = Callable[[Any, Tensor], Any]


def flat(x: Tensor) -> Tensor:
    return x.flatten(1)


def in_inference_mode(s: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        features = s.lstm(s.first(flat(x))[:, None])[0][:, 0]
    return s.second(features)


def functionally(s: Any, x: Tensor) -> Tensor:
    return s.second(torch.func.functional_call(s.first, dict(s.first.named_parameters()), (flat(x),)))


def grouped_queries(s: Any, x: Tensor) -> Tensor:
    """Four heads of queries for two of keys and values, causal."""
    q = rows(x).view(len(x), 32, 4, 24).transpose(1, 2)
    k = s.keys(rows(x)).view(len(x), 32, 2, 24).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True).mean((1, 2)) @ s.out


def with_a_second_try(s: Any, x: Tensor) -> Tensor:
    try:
        features = s.conv(x[:, :2])  # a channel is missing
    except RuntimeError:
        features = s.conv(x)
    return s.second(features.mean((2, 3)))


class HandmadeLSTM(nn.LSTM):
    """A type that thop has a rule for, with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), self.hidden_size)
        for step in x.unbind(1):
            gates = F.linear(step, self.weight_ih_l0) + F.linear(h, self.weight_hh_l0)
            i, f, g, o = gates.sigmoid().chunk(4, 1)
            c = f * c + i * g
            h = o * c.tanh()
        return h


class LowRankConv(nn.Conv2d):
    """Hu et al. 2021: a layer that has other layers in it."""

    def __init__(self) -> None:
        super().__init__(3, 8, 3)
        self.down, self.up = nn.Conv2d(3, 2, 3), nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


class Caching(nn.Module):
    """Its second pass makes use of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 8, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x if self.calls % 2 else x.repeat(1, 1, 2, 1)).mean((2, 3))


def in_half_precision(s: Any, x: Tensor) -> Tensor:
    return s.second(s.narrow(x.half()).float().mean((2, 3)))  # type: ignore[no-any-return]


def leave_when_sure(s: Any, x: Tensor) -> Tensor:
    """Its first answers are never sure; those after a training may be."""
    logits = s.one(x)
    return logits if logits.softmax(1).amax() > 0.9 else s.one(x.flip(1))


def check_values(s: Any, x: Tensor) -> Tensor:
    assert x.isfinite().all() and x.abs().max() < 100
    return s.second(s.conv(x).mean((2, 3)))  # type: ignore[no-any-return]


def read_one_by_one(s: Any, x: Tensor) -> Tensor:
    return s.conv(x).mean((2, 3)) + sum(float(value) for value in x.flatten()[:100])  # type: ignore[no-any-return]


def smaller_if_alone(s: Any, x: Tensor) -> Tensor:
    return s.conv(x if len(x) > 1 else x[..., ::2, ::2]).mean((2, 3))  # type: ignore[no-any-return]


def attend_to_other_images(s: Any, x: Tensor) -> Tensor:
    features = s.conv(x).mean((2, 3))
    return s.second((features @ features.T).softmax(1) @ features)  # type: ignore[no-any-return]


LINEAR = 30_720  # 3072 * 10
PARTS: dict[str, Callable[[], Any]] = {
    "w": lambda: weight(3072, 10),
    "v": lambda: weight(10, 3072),
    "first": lambda: nn.Linear(3072, 8),
    "second": lambda: nn.Linear(8, 10),
    "lstm": lambda: nn.LSTM(8, 8, batch_first=True),
    "handmade": lambda: HandmadeLSTM(96, 8, batch_first=True),
    "keys": lambda: nn.Linear(96, 48),
    "out": lambda: weight(24, 10),
    "cells": lambda: nn.ModuleList([nn.GRUCell(96, 8), nn.RNNCell(8, 10)]),
    "bilinear": lambda: nn.Bilinear(96, 96, 10),
    "conv": lambda: nn.Conv2d(3, 8, 3),
    "low_rank": LowRankConv,
    "caching": Caching,
}
COUNTED: dict[str, tuple[Run, int]] = {
    "matmul": (lambda s, x: flat(x) @ s.w, LINEAR),
    "matmul from the right": (lambda s, x: s.w.__rmatmul__(flat(x)), LINEAR),
    "linalg.matmul": (lambda s, x: torch.linalg.matmul(flat(x), s.w), LINEAR),
    "mm into a tensor": (lambda s, x: torch.mm(flat(x), s.w, out=torch.empty(len(x), 10)), LINEAR),
    "inner": (lambda s, x: torch.inner(flat(x), s.v), LINEAR),
    "dot": (lambda s, x: torch.stack([torch.stack([image.dot(v) for v in s.v]) for image in flat(x)]), LINEAR),
    "vdot": (lambda s, x: torch.stack([torch.stack([torch.vdot(image, v) for v in s.v]) for image in flat(x)]), LINEAR),
    "addmv": (lambda s, x: torch.stack([torch.addmv(s.v[:, 0], s.v, image) for image in flat(x)]), LINEAR),
    "linear of a vector": (lambda s, x: torch.stack([F.linear(image, s.v) for image in flat(x)]), LINEAR),
    "implicit einsum": (lambda s, x: torch.einsum("bc,cd", flat(x), s.w), LINEAR),
    "einsum of lists": (lambda s, x: torch.einsum(flat(x), [0, 1], s.w, [1, 2], [0, 2]), LINEAR),
    "vmap": (lambda s, x: torch.vmap(lambda image: torch.mv(s.v, image))(flat(x)), LINEAR),
    "module made in a forward pass": (lambda s, x: nn.Linear(3072, 10)(flat(x)), LINEAR),
    "functional call": (functionally, 3072 * 8 + 80),
    "inference mode": (in_inference_mode, 3072 * 8 + 4 * 8 * 16 + 80),
    "grouped queries": (grouped_queries, 32 * 96 * 48 + 4 * 2 * 32 * 32 * 24 + 240),
    "handmade LSTM": (lambda s, x: s.second(s.handmade(rows(x))), 32 * 4 * 8 * (96 + 8) + 80),
    "cells": (lambda s, x: s.cells[1](s.cells[0](rows(x)[:, 0])), 3 * 8 * (96 + 8) + 10 * (8 + 10)),
    "bilinear of sequences": (lambda s, x: s.bilinear(rows(x), rows(x)).mean(1), 32 * 97 * 96 * 10),
    "second try": (with_a_second_try, 27 * 8 * 900 + 80),
    "layers in a layer": (lambda s, x: s.second(s.low_rank(x).mean((2, 3))), (27 * 8 + 27 * 2 + 2 * 8) * 900 + 80),
    "checked values": (check_values, 27 * 8 * 900 + 80),
    "unbatched": (lambda s, x: torch.stack([s.second(s.conv(image).mean((1, 2))) for image in x]), 27 * 8 * 900 + 80),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_a_product_is_counted_however_it_is_called(name: str) -> None:
    run, macs = COUNTED[name]
    cost = flops.measure_cost(Net(run, **{name: make() for name, make in PARTS.items()}))
    assert (cost.macs, cost.verified) == (macs, True), cost.note


def in_a_thread(s: Any, x: Tensor) -> Tensor:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(flat(x) @ s.w))
    thread.start()
    thread.join()
    return found[0] + 0


def differentiate(s: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return flat(torch.autograd.grad(s.conv(x).sum(), x)[0])[:, :10]


def bag(s: Any, x: Tensor) -> Tensor:
    return F.embedding_bag(
        torch.arange(10).expand(len(x), 10).contiguous(), s.w, per_sample_weights=flat(x)[:, :10], mode="sum"
    )


PATHS = {"one": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), "two": lambda: nn.Conv2d(3, 8, 3)}
UNVERIFIED: dict[str, tuple[Run, str]] = {
    "operator": (lambda s, x: torch.ops.aten.mm(flat(x), s.w), "0 and 30,720 (aten.mm)"),
    "einsum of three": (lambda s, x: torch.einsum("bc,cd,de->be", flat(x), s.w, s.w[:10]), "aten.bmm"),
    "multi_dot": (lambda s, x: torch.linalg.multi_dot([flat(x), s.w, s.w[:10]]), "aten.mm"),
    "forward of a module": (lambda s, x: s.conv.forward(x).mean((2, 3)), "0 and 194,400 (aten.convolution)"),
    "thread": (in_a_thread, "no operator of PyTorch leads from the image to the output"),
    "list": (lambda s, x: torch.tensor(x.mean((2, 3)).tolist()), "Tensor.tolist"),
    "array": (lambda s, x: torch.as_tensor(np.asarray(x.mean((2, 3)))), "Tensor.__array__"),
    "backward pass": (differentiate, "aten.convolution_backward"),
    "weighted bag": (bag, "aten._embedding_bag (with weights)"),
    "convolution of a sequence": (lambda s, x: torch.conv_tbc(rows(x), s.w[None, :96], s.v[:, 0], 0), "aten.conv_tbc"),
    "solve": (lambda s, x: torch.linalg.solve(torch.eye(10) + s.v[:, :10], flat(x)[:, :10].T).T, "aten._linalg_solve_ex"),
    "spectrogram": (lambda s, x: torch.stft(flat(x), 16, return_complex=True, window=torch.ones(16)).abs(), "aten._fft_r2c"),
    "nested": (lambda s, x: torch.nested.nested_tensor([rows(x)[0]]).to_padded_tensor(0.0), "nested"),
    "chance": (lambda s, x: s.one(x) if torch.rand(()) < 0.6 else s.two(x), "depends on chance"),
    "Python's chance": (lambda s, x: s.one(x) if random.random() < 0.5 else s.two(x), "depends on chance"),
    "a sure answer": (leave_when_sure, "depends on the image"),
    "one by one": (read_one_by_one, "100 values of the image in Python"),
    "other images": (attend_to_other_images, "depends on how many there are"),
    "one image": (smaller_if_alone, "42,336 MACs for one image, then 388,800"),
    "second pass": (lambda s, x: s.caching(x), "on how often the network was called: 194,400 MACs for one image, then 803,520"),
    "bright pixels": (lambda s, x: x[x > 0.5][:, None] @ s.w[:1], "depends on the image"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNVERIFIED)
def test_what_one_counter_misses_is_named(name: str) -> None:
    run, words = UNVERIFIED[name]
    python, numpy = random.getstate(), np.random.get_state()[1].copy()
    cost = flops.measure_cost(Net(run, **{name: make() for name, make in {**PARTS, **PATHS}.items()}))
    assert not cost.verified and words in cost.note
    assert random.getstate() == python and np.array_equal(np.random.get_state()[1], numpy)


def test_a_part_in_half_precision_is_counted_as_it_is() -> None:
    cost = flops.measure_cost(Net(in_half_precision, narrow=nn.Conv2d(3, 8, 3).half(), second=nn.Linear(8, 10)))
    assert (cost.macs, cost.verified) == (27 * 8 * 900 + 80, True), cost.note


def test_a_difference_of_a_thousandth_is_named() -> None:
    """The functional convolution is 72 of 160 million multiply-adds."""

    def run(s: Any, x: Tensor) -> Tensor:
        return s.large(F.conv2d(x[..., :1, :1], s.filter) + x).mean((2, 3))

    cost = flops.measure_cost(Net(run, large=nn.Conv2d(3, 10, 65, padding=32), filter=weight(1, 3, 1, 1)))
    assert not cost.verified and "in the model itself 0 and 3 (aten.convolution)" in cost.note


def test_differences_that_cancel_each_other_are_named() -> None:
    def double(module: Any, inputs: Any, output: Any) -> None:
        module.total_ops += 2 * output.numel() * module.in_features

    def run(s: Any, x: Tensor) -> Tensor:
        return s.linear(flat(x)) + F.conv2d(x, s.filters).flatten(1)

    net = Net(run, linear=nn.Linear(3072, 10), filters=weight(10, 3, 32, 32))
    cost = flops.measure_cost(net, rules={nn.Linear: double})
    assert cost.macs == 2 * LINEAR and not cost.verified and "in linear 61,440 and 30,720 (aten.addmm)" in cost.note


def test_a_rule_counts_the_submodules_of_its_type_too() -> None:
    class Block(nn.Sequential):
        pass

    def count(module: Any, inputs: Any, output: Any) -> None:
        module.total_ops += 3072 * 8 + 80

    model = nn.Sequential(nn.Flatten(), Block(nn.Linear(3072, 8), nn.Linear(8, 10)))
    cost = flops.measure_cost(model, rules={Block: count})
    assert (cost.macs, cost.verified) == (3072 * 8 + 80, True), cost.note
