"""Convolution, ReLU and pooling a few images at a time on a CPU, against torch's own modules one after the other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cifar import registry
from cifar.config import resolve
from cifar.kernels import pieces
from cifar.kernels.pieces import HalvingConv, halve_early
from cifar.parts import Training

IMAGES = torch.zeros(1, 3, 32, 32)


def block(*, inner: int = 3, outer: int = 8, seed: int = 0, **how: Any) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(inner, outer, **{"kernel_size": 3, "padding": 1} | how), nn.ReLU(), nn.MaxPool2d(2))


def both(model: nn.Module, inner: int = 3, side: int = 16) -> tuple[nn.Module, nn.Module]:
    """The network as it was, and as it becomes."""
    ours = copy.deepcopy(model)
    assert halve_early(ours, torch.zeros(1, inner, side, side, dtype=next(model.parameters()).dtype)) == 1
    return model, ours


def passed(model: nn.Module, x: Tensor, g: Tensor | None = None) -> list[Tensor]:
    """What comes out, and the gradients of the images and of every parameter."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(torch.ones_like(y) if g is None else g)
    found = [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]
    assert all(each is not None for each in found)
    return [each for each in found if each is not None]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 9),
    inner=st.sampled_from([2, 4, 6]),
    outer=st.sampled_from([2, 8]),
    height=st.integers(6, 11),
    width=st.integers(6, 11),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.integers(1, 2),
    bias=st.booleans(),
    last=st.booleans(),
    at_once=st.integers(1, 9),
)
def test_values_and_gradients_are_torchs_whatever_the_geometry(
    count: int, inner: int, outer: int, height: int, width: int, kernel: int, stride: int, padding: int, dilation: int,
    groups: int, bias: bool, last: bool, at_once: int,
) -> None:  # fmt: skip
    how = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
    layout = torch.channels_last if last else torch.contiguous_format
    model = block(inner=inner, outer=outer, **how).to(torch.float64, memory_format=layout)
    x = torch.randn(count, inner, height, width, dtype=torch.float64).contiguous(memory_format=layout)
    with torch.no_grad():
        made = model[0](x)
    if min(made.shape[2:]) < 2:
        return  # nothing to pool
    theirs, ours = model, copy.deepcopy(model)
    assert halve_early(ours, x[:1]) == 1
    size = made[0].numel() * made.element_size()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", at_once * size)
        geometry = ours[0].stride, ours[0].padding, ours[0].dilation, ours[0].groups
        cut = list(pieces.pieces(x, ours[0].weight, geometry))
        assert [i for piece in cut for i in range(piece.start, piece.stop)] == list(range(count)), "each image once"
        assert len(cut) == (1 if count < 2 * at_once else -(-count // at_once)), "as large as was asked for"
        g = torch.randn_like(theirs(x))
        for a, b in zip(passed(ours, x, g), passed(theirs, x, g), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            assert a.stride() == b.stride(), "and lies in memory as theirs does"


@pytest.mark.parametrize("name", ["worksheet1", "worksheet2"])
def test_a_whole_network_in_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 2**14)
    torch.manual_seed(0)
    theirs: Any = registry.models[name].build(width=8).to(memory_format=torch.channels_last)
    ours = copy.deepcopy(theirs)
    assert halve_early(ours, IMAGES) == (2 if name == "worksheet1" else 3)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(33, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    found, wanted = passed(ours, x), passed(theirs, x)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_only_what_wants_gradients_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 2**12)
    theirs, ours = both(block())
    x = torch.randn(5, 3, 16, 16)
    for frozen in ("0.weight", "0.bias"):
        for model in (theirs, ours):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name != frozen)
                parameter.grad = None
            model(x).sum().backward()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None and b.grad is not None:
                torch.testing.assert_close(a.grad, b.grad)


def test_ties_and_what_is_not_finite_are_as_torch_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 2**10)
    for content in (0.0, float("nan"), float("inf"), -float("inf")):
        theirs, ours = both(block(padding=0, kernel_size=1, bias=False, inner=1, outer=1), inner=1)
        torch.manual_seed(0)
        x = torch.randint(-1, 2, (6, 1, 16, 16)).float()  # many squares of equal numbers
        x[:, :, 3, 3] = content
        for a, b in zip(passed(ours, x), passed(theirs, x), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_autocast_has_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 2**12)
    theirs, ours = both(block())
    x, found = torch.randn(7, 3, 16, 16), []
    for model in (theirs, ours):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        found.append([y.detach().float(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(b.abs().max()))  # sums of pieces, in bfloat16


def test_an_image_without_a_batch_and_no_image_at_all() -> None:
    theirs, ours = both(block())
    for shape in ((3, 16, 16), (0, 3, 16, 16)):
        x = torch.randn(shape)
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.slow
def test_a_compiler_sees_torchs_own() -> None:
    theirs, ours = both(block())
    x = torch.randn(7, 3, 16, 16)
    found = passed(torch.compile(ours, fullgraph=True), x)
    for a, b in zip(found, passed(theirs, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Looks(nn.Module):
    """Uses what the convolution made a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = block()

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x) + self.parts[0](x).mean()  # type: ignore[no-any-return]


def _hooked(which: int) -> nn.Module:
    model = block()
    model[which].register_forward_hook(lambda module, given, made: None)
    return model


def _twice() -> nn.Module:
    first = block(inner=3, outer=3)
    return nn.Sequential(*first, first[0], nn.ReLU(), nn.MaxPool2d(2))


class Own(nn.Sequential):
    """May do as it likes with its parts."""


def _with(index: int, module: nn.Module) -> nn.Module:
    model = block()
    model[index] = module
    return model


OTHERS: dict[str, nn.Module] = {
    "seen twice": Looks(),
    "a hook at the convolution": _hooked(0),
    "a hook at the ReLU": _hooked(1),
    "a hook at the row": nn.Sequential(_hooked(2)),
    "the same filters twice": _twice(),
    "a Sequential of one's own": Own(*block()),
    "another activation": _with(1, nn.GELU()),
    "another pool": _with(2, nn.MaxPool2d(3, 2, 1)),
    "a pool that tells where": _with(2, nn.MaxPool2d(2, ceil_mode=True)),
    "padding with what is there": block(padding_mode="reflect"),
    "padding by name": block(padding="same"),
    "no pool": nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_somebody_else_may_see_or_what_is_something_else_stays(name: str) -> None:
    model = OTHERS[name]
    kinds = [type(module) for module in model.modules()]
    was = model.training
    assert halve_early(model, IMAGES) == 0
    assert [type(module) for module in model.modules()] == kinds and model.training == was


def test_a_run_on_a_cpu_uses_it_and_its_average_too(tmp_path: Path) -> None:
    config = resolve({"model": "worksheet1", "width": 4, "dataset": "stand-in", "device": "cpu", "ema": 0.9, "train_size": 256})
    training = Training(config, tmp_path)
    assert training.average
    for model in (training.model, training.average.averaged):
        assert [type(m) for m in model.modules()].count(HalvingConv) == 2
