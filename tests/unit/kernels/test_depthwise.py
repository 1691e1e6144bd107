"""Depthwise convolutions with the BatchNorms around them against torch's modules in double precision."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from cifar.kernels import fuse
from cifar.kernels.triton import batch_norm, choices, depthwise
from cifar.kernels.triton.depthwise import DepthwiseConfig, DepthwiseOptions
from cifar.models.blocks import conv_norm
from cifar.models.mobilenet_v2 import InvertedResidual
from cifar.models.shufflenet_v2 import ShuffleBlock
from helpers.kernels import (
    BY_DTYPE,
    DEVICE,
    DTYPES,
    TOLERANCE,
    draw_images,
    forget_verifications,
    measure_error,
    record_verifications,
    slow_here,
)

pytestmark = pytest.mark.usefixtures("interpreted")

ACTIVATIONS = {0: nn.Identity, 1: nn.ReLU, 2: nn.ReLU6}
CASES: list[Any] = [  # shape, stride, activation before (None: no BatchNorm before) and after
    ((2, 24, 4, 4), 1, 2, 2),
    slow_here((3, 36, 7, 6), 2, 1, 0),  # channels that four divides, odd rows
    slow_here((2, 58, 5, 7), 1, None, 0),  # two divide them; more than one block of channels
    slow_here((2, 16, 8, 8), 2, None, 2),
    slow_here((1, 33, 3, 3), 2, 0, 1),  # odd channels
    slow_here((5, 8, 1, 2), 1, 1, 1),
]


class Exact(nn.Module):
    """BatchNorm, activation, depthwise convolution, BatchNorm, activation; in double precision."""

    def __init__(self, channels: int, stride: int, before: int | None, after: int) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(channels, eps=1e-3) if before is not None else None
        self.middle = ACTIVATIONS[before or 0]()
        self.conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.last = ACTIVATIONS[after]()
        for module in (self.first, self.norm):
            if module is not None:
                nn.init.uniform_(module.weight, 0.5, 3.0)
                nn.init.uniform_(module.bias, -1.0, 2.0)
        self.to(DEVICE).double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.first(x)) if self.first is not None else x
        return self.last(self.norm(self.conv(x)))


def moments_of(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    return torch.stack([mean, variance]).float()


@BY_DTYPE
@pytest.mark.parametrize("rows", [2, slow_here(4)])
@pytest.mark.parametrize(("shape", "stride", "before", "after"), CASES)
def test_values_and_gradients_are_those_of_five_modules_in_double_precision(
    shape: tuple[int, ...],
    stride: int,
    before: int | None,
    after: int,
    rows: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("FORWARD_CONFIGS", "BACKWARD_CONFIGS"):
        monkeypatch.setattr(depthwise, name, (DepthwiseConfig(rows, 2, 4, 4),))
    torch.manual_seed(0)
    channels = shape[1]
    x = (draw_images(*shape) * torch.linspace(0.5, 2, channels, device=DEVICE)[:, None, None] + 0.3).to(dtype)
    exact = Exact(channels, stride, before, after)
    with torch.no_grad():
        exact.conv.weight.copy_(exact.conv.weight.to(dtype))
    leaf = x.double().requires_grad_()
    wanted = exact(leaf)
    g = draw_images(*wanted.shape, dtype=dtype)
    wanted.backward(g.double())

    options = DepthwiseOptions(stride, int(before is not None), before or 0, after)
    leaves: dict[str, Tensor] = {name: p.detach().float().requires_grad_() for name, p in exact.named_parameters()}
    ours, norm_in = x.clone().requires_grad_(), []
    if exact.first is not None:
        norm_in = [moments_of(x), leaves["first.weight"], leaves["first.bias"]]
    proved = record_verifications(monkeypatch, depthwise)
    pivot = torch.full((channels,), 0.1, device=DEVICE)
    weight, fixed = leaves["conv.weight"], [value.detach() for value in norm_in]
    given = x, weight.detach(), pivot, fixed, 1e-3, list(options), 3
    y, partials = depthwise.depthwise_sums(*given)
    norm = [moments_of(y), leaves["norm.weight"], leaves["norm.bias"]]
    z = depthwise.depthwise_norm(y, ours, weight, norm, norm_in, [1e-5, 1e-3], list(options))
    z.backward(g)
    assert proved == [True, True], "the kernels ran"

    assert y.is_contiguous(memory_format=torch.channels_last) and z.dtype == dtype
    active = exact.middle(exact.first(x.double())) if exact.first is not None else x.double()
    full = exact.conv(active).detach()
    assert measure_error(y, full) < TOLERANCE[dtype]
    centered = y.double() - 0.1
    sums = torch.stack([centered.sum((0, 2, 3)), centered.square().sum((0, 2, 3))])
    assert measure_error(partials.sum(0), sums) < 1e-5
    loose = max(3 * TOLERANCE[dtype], 1e-5)
    assert measure_error(z.detach(), wanted.detach()) < loose
    assert ours.grad is not None and measure_error(ours.grad, leaf.grad) < loose
    for name, parameter in exact.named_parameters():
        found = leaves[name].grad
        assert found is not None and found.shape == parameter.shape
        scale = max(parameter.grad.norm(), 1e-3 * g.double().norm())  # what cancels is compared with what it is a sum of
        assert (found.double() - parameter.grad).norm() < loose * scale, name
    for compute in (depthwise.depthwise_sums_triton, depthwise.depthwise_sums_reference):
        assert measure_error(compute(*given)[0], full) < TOLERANCE[dtype]


@pytest.mark.slow
def test_the_operators_say_what_they_return() -> None:
    x, weight, pivot = draw_images(2, 8, 4, 4, dtype=DTYPES[0]), draw_images(8, 1, 3, 3), torch.zeros(8, device=DEVICE)
    norm = [torch.ones(2, 8, device=DEVICE), torch.ones(8, device=DEVICE), pivot]
    checks = "test_schema", "test_faketensor"
    for options, norm_in in (([2, 1, 1, 0], norm), ([1, 0, 0, 2], [])):
        torch.library.opcheck(depthwise.depthwise_sums, (x, weight, pivot, norm_in, 1e-5, options, 3), test_utils=checks)
        y = depthwise.depthwise_sums(x, weight, pivot, norm_in, 1e-5, options, 3)[0]
        given = [y, y, x], weight, [*norm, norm[0]], norm_in, [1e-5, 1e-5], options
        torch.library.opcheck(depthwise.depthwise_gradients, given, test_utils=checks)


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_a_wrong_kernel_is_found_out_and_not_used(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "depthwise_sums_triton" if which == "forward" else "depthwise_gradients_triton"
    right = getattr(depthwise, name)

    def wrong(*given: Any) -> tuple[Tensor, Tensor]:
        images, sums = right(*given)
        return images, sums * 1.05

    monkeypatch.setattr(depthwise, name, wrong)
    forget_verifications(monkeypatch, depthwise)
    x = draw_images(2, 8, 4, 4, dtype=DTYPES[0])
    for kernel in ("forward", "backward"):
        assert depthwise.verifier.can_use(kernel, x, 8, (1, 0, 0, 1)) == (kernel != which)
    forget_choices(monkeypatch)
    assert not depthwise.is_worthwhile(x.shape, x.dtype, x.device, DepthwiseOptions(1, 0, 0, 1))


@pytest.mark.parametrize("activation", [0, 1, slow_here(2)])
@pytest.mark.parametrize("channels", [72, slow_here(130)])
def test_batch_norms_sums_of_many_channels(channels: int, activation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_norm, "WIDE_SUMS_CONFIG", batch_norm.LaunchConfig(512, 4, 1, 1))
    torch.manual_seed(0)
    x, g = (3 * draw_images(3, channels, 4, 5) + 1).to(DTYPES[0]), draw_images(3, channels, 4, 5, dtype=DTYPES[0])
    exact = nn.BatchNorm2d(channels, device=DEVICE, dtype=torch.float64)
    nn.init.uniform_(exact.weight, 1, 4)
    nn.init.uniform_(exact.bias, -1, 3)
    ACTIVATIONS[activation]()(exact(x.double())).backward(g.double())
    wanted = torch.stack([exact.bias.grad, exact.weight.grad])
    given = g, x, moments_of(x), exact.weight.detach().float(), exact.bias.detach().float(), exact.eps, activation
    for compute in (batch_norm.gradient_sums_triton, batch_norm.gradient_sums_reference):
        assert measure_error(compute(*given), wanted) < 1e-5
    pivot = torch.linspace(-1, 1, channels, device=DEVICE)
    centered = x.double() - pivot.double()[:, None, None]
    sums = torch.stack([centered.sum((0, 2, 3)), centered.square().sum((0, 2, 3))])
    assert measure_error(batch_norm.pixel_sums_triton(x, pivot, 2).sum(0), sums) < 1e-5


# -- in a network ------------------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """An inverted residual whose expanded images somebody else reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.block = InvertedResidual(8, 8, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        expanded = self.block.expand(x)
        return self.block.project(self.block.depthwise(expanded)) + expanded.mean()


def make_network(kind: str) -> nn.Sequential:
    """A stem and two blocks, the second with stride 2 where that is possible."""
    blocks: dict[str, list[nn.Module]] = {
        "mobilenet_v2": [conv_norm(3, 8, activation=nn.ReLU6), InvertedResidual(8, 8, 1, 2), InvertedResidual(8, 16, 2, 2)],
        "shufflenet_v2": [conv_norm(3, 8), ShuffleBlock(8, 16, 2), ShuffleBlock(16, 16, 1)],
        "first": [conv_norm(3, 8, activation=nn.ReLU6), InvertedResidual(8, 16, 1, 1)],
        "watched": [conv_norm(3, 8), Watched(), conv_norm(8, 16, 1)],
    }
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(body=nn.Sequential(*blocks[kind]), head=nn.Sequential()))
    model.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return model.to(DEVICE, memory_format=torch.channels_last)


def forget_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel that is right counts as quick."""
    monkeypatch.setattr(depthwise, "CHOICES", choices.Choices())
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(depthwise, "_time_torch", lambda *_: float("inf"))


KINDS = [
    ("mobilenet_v2", {"FusedAwayConvNorm": 2, "FusedDepthwise": 2, "FusedConvNorm": 3}),
    ("shufflenet_v2", {"FusedAwayConvNorm": 2, "FusedDepthwise": 3, "FusedConvNorm": 4}),
    ("first", {"FusedAwayConvNorm": 1, "FusedDepthwise": 1, "FusedConvNorm": 1}),
    ("watched", {"FusedDepthwise": 1, "FusedConvNorm": 4}),
]


@pytest.mark.slow
@pytest.mark.parametrize("matmul", [False, True], ids=["convolutions", "products"])
@pytest.mark.parametrize(("kind", "classes"), KINDS, ids=[kind for kind, _ in KINDS])
def test_networks_learn_what_torchs_learn(
    kind: str, classes: dict[str, int], matmul: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = DTYPES[0]
    monkeypatch.setattr(fuse.TritonConv2d, "precision", dtype)
    monkeypatch.setattr(fuse, "is_matmul_quicker", lambda *_: matmul)
    forget_choices(monkeypatch)
    proved = record_verifications(monkeypatch, depthwise)
    theirs = make_network(kind)
    ours, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    x, labels = draw_images(6, 3, 6, 6), torch.arange(6, device=DEVICE)
    names = list(ours.state_dict())
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        fuse.fuse_model(ours, x[:1], 6)
    ours = copy.deepcopy(ours)  # as an average of the weights is made
    found = [type(part).__name__ for part in ours.modules() if isinstance(part, fuse.FusedConvNorm)]
    assert {name: found.count(name) for name in set(found)} == classes
    assert any(isinstance(part, fuse.MatmulConv2d) for part in ours.modules()) == matmul
    assert list(ours.state_dict()) == names and len(list(ours.parameters())) == len(list(theirs.parameters()))
    assert proved and all(proved)

    def loss(model: nn.Module, images: Tensor) -> Tensor:
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32 and images.dtype != torch.float64):
            logits = model(images)
        return nn.functional.cross_entropy(logits.to(images.dtype), labels)

    compiled = torch.compile(loss, dynamic=False, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    compiled(ours, x).backward()
    loss(exact, x.double()).backward()
    loss(theirs, x).backward()
    wanted = torch.cat([p.grad.flatten() for p in exact.parameters()])
    errors = {
        who: float((torch.cat([p.grad.flatten() for p in model.parameters()]).double() - wanted).norm() / wanted.norm())
        for who, model in (("ours", ours), ("theirs", theirs))
    }
    assert errors["ours"] < max(1.5 * errors["theirs"], 1e-5), errors
    for (name, value), reached in zip(exact.named_buffers(), ours.buffers(), strict=True):
        error = (reached.double() - value.double()).norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2) * max(1.0, value.double().norm()), name  # some are zero
    with torch.no_grad():
        assert measure_error(ours.eval()(x), exact.eval()(x.double())) < 1e-4, "evaluated as before"


def test_choices_are_found_again_by_the_next_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A/B 1")
    device = torch.device("cuda")
    assert choices.Choices().get("one", device, lambda: True) is True
    again = choices.Choices()
    assert again.get("one", device, lambda: False) is True and again.find("two", device) is None
    (file,) = (tmp_path / "cifar").iterdir()
    file.write_text("cut off {")
    assert choices.Choices().get("one", device, lambda: 3) == 3


def test_nothing_is_fused_that_is_slower_than_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, "is_worthwhile", lambda *_: False)
    model = make_network("mobilenet_v2")
    fuse.fuse_model(model, torch.zeros(1, 3, 6, 6, device=DEVICE), 6)
    assert not any(isinstance(part, (fuse.FusedDepthwise, fuse.FusedAwayConvNorm)) for part in model.modules())


def test_only_depthwise_convolutions_of_the_kind_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, "is_worthwhile", lambda *_: True)
    taken = [{"padding": 1}, {"padding": 1, "stride": 2}]
    left = [{"padding": 0}, {"padding": 1, "dilation": 2}, {"padding": 1, "bias": True}, {"padding": 1, "groups": 4}]
    left += [{"padding": 1, "stride": (1, 2)}, {"padding": 1, "padding_mode": "reflect"}, {"kernel_size": 5, "padding": 2}]
    for number, options in enumerate(taken + left):
        given: dict[str, Any] = {"kernel_size": 3, "groups": 8, "bias": False} | options
        row = nn.Sequential(nn.Conv2d(8, 8, **given), nn.BatchNorm2d(8)).to(DEVICE)
        fuse.fuse_model(nn.Sequential(row), torch.zeros(1, 8, 6, 6, device=DEVICE))
        assert (type(row) is fuse.FusedDepthwise) == (number < len(taken)), options


def test_a_network_without_depthwise_convolutions_is_left_as_it_was() -> None:
    wide = nn.Sequential(nn.Conv2d(8, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU()).to(DEVICE)
    capped = nn.Sequential(nn.Conv2d(96, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()).to(DEVICE)
    fuse.fuse_model(nn.Sequential(wide, capped), torch.zeros(1, 8, 4, 4, device=DEVICE))
    assert type(wide) is nn.Sequential and type(capped) is nn.Sequential and type(wide[0]) is nn.Conv2d
