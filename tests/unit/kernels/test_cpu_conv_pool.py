"""Convolution, ReLU and pooling a few images at a time on a CPU, against torch's own modules one after the other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cifar import registry
from cifar.config.resolve import resolve_config
from cifar.kernels import cpu_conv_pool
from cifar.kernels.cpu_conv_pool import ChunkedSequential, chunk_conv_pools
from cifar.training.trainer import Trainer


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same chunks on every machine."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def block(*, inner: int = 3, outer: int = 8, seed: int = 0, **how: Any) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(inner, outer, **{"kernel_size": 3, "padding": 1} | how), nn.ReLU(), nn.MaxPool2d(2))


def both(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The network as it was, and as it becomes."""
    ours = copy.deepcopy(model)
    assert chunk_conv_pools(ours) == 1
    return model, ours


def passed(model: nn.Module, x: Tensor, g: Tensor | None = None) -> list[Tensor]:
    """What comes out, and the gradients of the images and of every parameter."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(torch.ones_like(y) if g is None else g)
    found = [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]
    assert all(each is not None for each in found)
    return [each for each in found if each is not None]


@settings(max_examples=150, deadline=None)
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
    pool=st.sampled_from(
        [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((2, 3), ceil_mode=True), nn.MaxPool2d(2, 1, dilation=2)]
    ),
    bias=st.booleans(),
    last=st.booleans(),
    at_once=st.integers(1, 9),
)
def test_values_and_gradients_are_torchs_whatever_the_geometry(
    count: int, inner: int, outer: int, height: int, width: int, kernel: int, stride: int, padding: int, dilation: int,
    groups: int, pool: nn.MaxPool2d, bias: bool, last: bool, at_once: int,
) -> None:  # fmt: skip
    how = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
    layout = torch.channels_last if last else torch.contiguous_format
    model = block(inner=inner, outer=outer, **how).to(torch.float64, memory_format=layout)
    model[2] = pool
    x = torch.randn(count, inner, height, width, dtype=torch.float64).contiguous(memory_format=layout)
    with torch.no_grad():
        made = model[0](x)
    assume(min(made.shape[2:]) >= 4)  # else there is nothing to pool
    theirs, ours = both(model)
    size = made[0].numel() * made.element_size()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_conv_pool, "CHUNK_BYTES", at_once * size)
        geometry = ours[0].stride, ours[0].padding, ours[0].dilation, ours[0].groups
        cut = list(cpu_conv_pool.split_batch(x, ours[0].weight, geometry))
        assert [i for chunk in cut for i in range(chunk.start, chunk.stop)] == list(range(count)), "each image once"
        assert len(cut) == (1 if count < 2 * at_once else -(-count // at_once)), "as large as was asked for"
        g = torch.randn_like(theirs(x))
        for a, b in zip(passed(ours, x, g), passed(theirs, x, g), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            assert a.stride() == b.stride(), "and lies in memory as theirs does"


@pytest.mark.parametrize("name", ["worksheet1", "worksheet2"])
def test_a_whole_network_in_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_conv_pool, "CHUNK_BYTES", 2**14)
    torch.manual_seed(0)
    theirs: Any = registry.models[name].build(width=8).to(memory_format=torch.channels_last)
    ours = copy.deepcopy(theirs)
    assert chunk_conv_pools(ours) == (2 if name == "worksheet1" else 3)
    assert list(ours.state_dict()) == list(theirs.state_dict()) and repr(ours) == repr(theirs)
    x = torch.randn(33, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    found, wanted = passed(ours, x), passed(theirs, x)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_only_what_wants_gradients_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_conv_pool, "CHUNK_BYTES", 2**12)
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
    monkeypatch.setattr(cpu_conv_pool, "CHUNK_BYTES", 2**10)
    for content in (0.0, float("nan"), float("inf"), -float("inf")):
        theirs, ours = both(block(padding=0, kernel_size=1, bias=False, inner=1, outer=1))
        torch.manual_seed(0)
        x = torch.randint(-1, 2, (6, 1, 16, 16)).float()  # many squares of equal numbers
        x[:, :, 3, 3] = content
        for a, b in zip(passed(ours, x), passed(theirs, x), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_many_chunks_in_bfloat16_add_up_as_well_as_torchs_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = both(block(padding=1))
    torch.manual_seed(1)
    x = torch.randn(512, 3, 16, 16)
    exact = passed(copy.deepcopy(theirs).double(), x.double())
    monkeypatch.setattr(cpu_conv_pool, "CHUNK_BYTES", 8 * 8 * 16 * 16 * 2)  # 64 chunks
    found = {}
    for name, model in (("theirs", theirs), ("ours", ours)):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        y.backward(torch.ones_like(y))
        found[name] = [p.grad for p in model.parameters()]
    for a, b, wanted in zip(found["ours"], found["theirs"], exact[2:], strict=True):
        assert a is not None and b is not None and a.dtype == torch.float32
        assert (a - wanted).norm() <= 1.5 * (b - wanted).norm()


@pytest.mark.parametrize(
    "after", [nn.Dropout(0.5, inplace=True), nn.Hardtanh(-0.5, 0.5, inplace=True)], ids=["dropout", "tanh"]
)
def test_what_comes_out_may_be_changed_in_place(after: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_conv_pool, "CHUNK_BYTES", 2**12)
    theirs, ours = both(nn.Sequential(*block(), after))
    x, found = torch.randn(9, 3, 16, 16), []
    for model in (theirs, ours):
        torch.manual_seed(1)
        found.append(passed(model, x))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_image_without_a_batch_and_no_image_at_all() -> None:
    theirs, ours = both(block())
    for shape in ((3, 16, 16), (0, 3, 16, 16)):
        x = torch.randn(shape)
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.slow
def test_a_compiler_sees_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = both(block())
    x = torch.randn(7, 3, 16, 16)
    wanted = passed(theirs, x)
    monkeypatch.setattr(cpu_conv_pool.ConvReLUPool, "apply", None)  # whoever calls it fails
    for a, b in zip(passed(torch.compile(ours, fullgraph=True), x), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.func.vmap(ours)(x[:, None])  # that too
    with pytest.raises(TypeError):
        ours(x)


def _hooked(which: int, kind: str) -> nn.Module:
    model = block()
    getattr(model[which], f"register_{kind}")(lambda *_: None)
    return model


def _with(index: int, module: nn.Module) -> nn.Module:
    model = block()
    model[index] = module
    return model


def _forward_of_its_own() -> nn.Module:
    model = block()
    model[1].forward = lambda x: x.abs()
    return model


class Own(nn.Sequential):
    """May do as it likes with its parts."""


OTHERS: dict[str, nn.Module] = {
    "a hook at the convolution": _hooked(0, "forward_hook"),
    "a hook before the ReLU": _hooked(1, "forward_pre_hook"),
    "a hook at the pool's gradient": _hooked(2, "full_backward_hook"),
    "a hook before the convolution's gradient": _hooked(0, "full_backward_pre_hook"),
    "a Sequential of one's own": Own(*block()),
    "a ReLU with a forward of its own": _forward_of_its_own(),
    "another activation": _with(1, nn.GELU()),
    "another pool": _with(2, nn.AvgPool2d(2)),
    "a pool that tells where": _with(2, nn.MaxPool2d(2, return_indices=True)),
    "padding with what is there": block(padding_mode="reflect"),
    "padding by name": block(padding="same"),
    "no pool": nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_somebody_else_may_see_or_what_is_something_else_stays(name: str) -> None:
    kinds = [type(module) for module in OTHERS[name].modules()]
    assert chunk_conv_pools(OTHERS[name]) == 0
    assert [type(module) for module in OTHERS[name].modules()] == kinds


def test_a_hook_that_comes_later_sees_what_it_would_see() -> None:
    ours, seen = both(block())[1], []
    handle = ours[0].register_forward_hook(lambda module, given, made: seen.append(made.shape))
    x = torch.randn(2, 3, 16, 16)
    ours(x)
    handle.remove()
    ours(x)
    assert seen == [(2, 8, 16, 16)]
    with torch.no_grad():
        torch.testing.assert_close(ours[0](input=x), nn.Conv2d.forward(ours[0], x))


def test_a_hook_of_all_modules_sees_each() -> None:
    ours, seen = both(block())[1], []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, given, made: seen.append(type(module)))
    try:
        ours(torch.randn(2, 3, 16, 16))
    finally:
        handle.remove()
    assert seen == [nn.Conv2d, nn.ReLU, nn.MaxPool2d, ChunkedSequential]


def test_what_a_convolution_does_not_take_is_torchs_to_refuse() -> None:
    theirs, ours = both(block())
    for x in (torch.randn(9, 4, 16, 16), torch.randn(9, 3, 16, 16).double(), torch.ones(9, 3, 16, 16, dtype=torch.int64)):
        said = []
        for model in (theirs, ours):
            with pytest.raises(RuntimeError) as caught:
                model(x)
            said.append(str(caught.value))
        assert said[0] == said[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.double()(torch.randn(9, 3, 16, 16).double()).dtype == torch.float64  # as autocast has it


def test_rows_among_other_modules_and_of_other_shapes() -> None:
    torch.manual_seed(0)
    odd = nn.Sequential(nn.Flatten(), nn.Linear(4 * 6 * 6, 5), nn.ReLU())
    theirs = nn.Sequential(nn.Identity(), *block(), nn.Conv2d(8, 8, 3), nn.ReLU(), block(inner=8, outer=4, padding=2), odd)
    ours = copy.deepcopy(theirs)
    assert chunk_conv_pools(ours) == 2
    x = torch.randn(5, 3, 26, 26)
    for a, b in zip(passed(ours, x), passed(theirs, x), strict=True):
        torch.testing.assert_close(a, b)


def test_a_run_on_a_cpu_uses_it_and_its_average_too(tmp_path: Path) -> None:
    config = resolve_config(
        {"model": "worksheet1", "width": 4, "dataset": "stand-in", "device": "cpu", "ema": 0.9, "train_size": 256}
    )
    training = Trainer(config, tmp_path)
    assert training.ema
    assert type(training.model) is type(training.ema.averaged_model) is ChunkedSequential
