"""The Triton convolutions against torch's: on a GPU as they are used, elsewhere by Triton's interpreter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from cifar import registry
from cifar.kernels import fuse
from cifar.kernels.triton import conv3x3
from cifar.kernels.triton.launch import choose_num_programs
from helpers.kernels import (
    BY_DTYPE,
    DEVICE,
    DTYPES,
    GPU,
    TOLERANCE,
    draw_images,
    forget_verifications,
    measure_error,
    record_verifications,
    slow_here,
)

pytestmark = pytest.mark.usefixtures("interpreted")
ADDED = conv3x3.SUM_TILE, conv3x3.WIDE_SUM_TILE, conv3x3.WIDE_SUM_SIZE


BUILT = [
    "conv",
    "densenet_bc",
    slow_here("mobilenet_v2"),
    "preact_resnet",
    slow_here("resnet"),
    slow_here("shufflenet_v2"),
    "vgg",
    slow_here("worksheet1"),
    "worksheet2",
    "wrn",
]
SHAPES: list[Any] = [(3, 16, 8, 8), (16, 16, 8, 8), (3, 5, 12, 9), (8, 16, 8, 6), (16, 32, 4, 5)]
SHAPES += [slow_here(32, 16, 4, 4), slow_here(32, 64, 4, 8)]
SHAPES += [slow_here(64, 64, 4, 8), (40, 48, 5, 7), slow_here(64, 16, 3, 4)]  # by single taps


@BY_DTYPE
@pytest.mark.parametrize(("inner", "outer", "height", "width"), SHAPES)
def test_each_kernel_gives_the_convolution_in_double_precision(
    inner: int, outer: int, height: int, width: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, g = draw_images(3, inner, height, width, dtype=dtype), draw_images(3, outer, height, width, dtype=dtype)
    weight = draw_images(outer, inner, 3, 3, dtype=dtype).float()
    exact = x.double().requires_grad_(), weight.double().requires_grad_()
    y = nn.functional.conv2d(*exact, padding=1)
    y.backward(g.double())

    assert measure_error(conv3x3.convolve_3x3_triton(x, weight, False), y.detach()) < TOLERANCE[dtype]
    filters = conv3x3.correlate_3x3_triton(x, g)
    assert filters.dtype == torch.float32
    assert measure_error(filters, exact[1].grad) < 1e-5
    if conv3x3.supports_shape(outer, inner, height, width):
        assert measure_error(conv3x3.convolve_3x3_triton(g, weight, True), exact[0].grad) < TOLERANCE[dtype]


@pytest.mark.parametrize(("inner", "outer"), [(3, 16), (16, 16), slow_here(32, 64), slow_here(64, 64), slow_here(16, 48)])
@pytest.mark.parametrize("height", [8, 7], ids=["fits", "odd"])
def test_the_operators_have_torchs_gradients_whoever_computes_them(inner: int, outer: int, height: int) -> None:
    torch.manual_seed(0)
    dtype = DTYPES[0]
    x, weight = draw_images(2, inner, height, 8, dtype=dtype), draw_images(outer, inner, 3, 3)
    torch.library.opcheck(conv3x3.convolve_3x3, (x.clone(), weight.clone(), False), test_utils="test_faketensor")
    ours = x.clone().requires_grad_(), weight.clone().requires_grad_()
    exact = x.double().requires_grad_(), weight.to(dtype).double().requires_grad_()
    y, wanted = conv3x3.convolve_3x3(*ours, False), nn.functional.conv2d(*exact, padding=1)
    g = draw_images(*y.shape, dtype=dtype)
    y.backward(g)
    wanted.backward(g.double())
    for a, b in zip((y, ours[0].grad, ours[1].grad), (wanted, exact[0].grad, exact[1].grad), strict=True):
        assert a.is_contiguous(memory_format=torch.channels_last)
        assert measure_error(a.detach(), b.detach()) < TOLERANCE[dtype]


def test_a_wrong_kernel_is_found_out_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = draw_images(2, 3, 16, 16, dtype=DTYPES[0]), draw_images(16, 3, 3, 3)
    forget_verifications(monkeypatch, conv3x3)
    assert conv3x3.verifier.can_use("convolve", x, 16, weight.stride())
    forget_verifications(monkeypatch, conv3x3)
    right = conv3x3.convolve_3x3_triton
    monkeypatch.setattr(conv3x3, "convolve_3x3_triton", lambda *given: right(*given) * 1.05)
    assert not conv3x3.verifier.can_use("convolve", x, 16, weight.stride())
    y = conv3x3.convolve_3x3(x, weight, False)
    exact = nn.functional.conv2d(x.double(), weight.to(DTYPES[0]).double(), padding=1)
    assert measure_error(y, exact) < TOLERANCE[DTYPES[0]]


def test_a_program_that_goes_through_many_blocks_adds_them_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv3x3, "count_multiprocessors", lambda device: 1)
    torch.manual_seed(0)
    x, g, weight = (
        draw_images(37, 16, 16, 16, dtype=DTYPES[0]),
        draw_images(37, 16, 16, 16, dtype=DTYPES[0]),
        draw_images(16, 16, 3, 3),
    )
    num_strips = x.shape[0] * 16 * 16 // conv3x3.STRIP_ROWS
    for plan in (conv3x3.plan_convolution(16, 16), conv3x3.plan_correlation(16, 16)):
        num_programs = choose_num_programs(plan.config, num_strips, 1)
        assert num_strips > 3 * plan.config.block * num_programs, "at least three blocks a program"
    weight = weight.to(DTYPES[0]).float()
    wanted = conv3x3.convolve_3x3_reference(x.double(), weight.double(), False)
    assert measure_error(conv3x3.convolve_3x3_triton(x, weight, False), wanted) < TOLERANCE[DTYPES[0]]
    wanted = conv3x3.correlate_3x3_reference(x.double(), g.double()).double()
    assert measure_error(conv3x3.correlate_3x3_triton(x, g), wanted) < (
        1e-4 if GPU else 1e-5
    )  # 600 products are added in float32 in turn


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(("programs", "size"), [(1, 5), (64, 32), (65, 33), (200, 70)])
def test_what_programs_found_is_added_up(programs: int, size: int, many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(("SUM_TILE", "WIDE_SUM_TILE", "WIDE_SUM_SIZE"), ADDED, strict=True):
        monkeypatch.setattr(conv3x3, name, 0 if many and name == "WIDE_SUM_SIZE" else value)
    parts = torch.randn(programs, size, device=DEVICE)
    assert torch.allclose(conv3x3.sum_partials(parts).double(), parts.double().sum(0), atol=1e-5)


def test_there_is_no_second_derivative() -> None:
    x, weight = draw_images(1, 3, 4, 4, dtype=DTYPES[0]).requires_grad_(), draw_images(4, 3, 3, 3).requires_grad_()
    (first,) = torch.autograd.grad(conv3x3.convolve_3x3(x, weight, False).float().square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError):
        first.float().sum().backward()


def test_without_autocast_a_network_computes_what_it_did() -> None:
    model = nn.Conv2d(3, 16, 3, padding=1).to(DEVICE)
    x = draw_images(2, 3, 8, 8)
    before = model(x)
    assert fuse.fuse_model(model, x[:1]) == 1
    assert torch.equal(model.train()(x), before)


def test_only_convolutions_of_that_kind_are_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse.TritonConv2d, "precision", DTYPES[0])
    convolutions = [
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding="same", bias=False),
        nn.Conv2d(16, 16, 3, padding=1, groups=4),
        nn.Conv2d(16, 16, 5, padding=2),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(16, 16, 3, padding=1).requires_grad_(False),
        nn.Conv2d(16, 64, 3, padding=1),
        nn.Conv2d(64, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3),  # from here on sides are no multiples of four
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1, stride=2),
    ]
    model = nn.Sequential(*convolutions).to(DEVICE).train()
    names, x = list(model.state_dict()), draw_images(2, 3, 16, 16)

    assert fuse.fuse_model(model, torch.zeros(1, 3, 16, 16, device=DEVICE)) == 3
    assert [n for n, module in enumerate(model) if type(module) is fuse.TritonConv2d] == [0, 1, 6]
    assert list(model.state_dict()) == names and model.training
    first = convolutions[0].eval()
    with torch.inference_mode(), torch.autocast(DEVICE, DTYPES[0], enabled=GPU):
        found = first(x)
    assert (
        measure_error(found, nn.functional.conv2d(x, first.weight, first.bias, padding=1).detach().double())
        < TOLERANCE[DTYPES[0]]
    )


@pytest.mark.parametrize("dtype", [slow_here(DTYPES[0])], ids=str)
def test_compiled_and_with_batch_norm_it_learns_what_torchs_convolutions_learn(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    proved = record_verifications(monkeypatch, conv3x3)
    monkeypatch.setattr(fuse.TritonConv2d, "precision", dtype)

    def made() -> nn.Sequential:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)]
        model = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
        return model.to(DEVICE, memory_format=torch.channels_last)

    plain, quick = made(), made()
    x, labels = draw_images(8, 3, 8, 8), torch.arange(8, device=DEVICE)
    assert fuse.fuse_model(quick, x[:1].float()) == 2

    def loss(model: nn.Module) -> Tensor:
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            logits = model(x)
        return nn.functional.cross_entropy(logits.float(), labels)

    loss(plain).backward()
    torch.compile(loss, dynamic=False)(quick).backward()
    assert proved == [True] * 5, "two forward, one for the images' gradient, two for the filters'"
    for (name, wanted), ours in zip(plain.named_parameters(), quick.parameters(), strict=True):
        assert ours.grad is not None and wanted.grad is not None
        assert ours.grad.stride() == wanted.grad.stride()
        assert measure_error(ours.grad, wanted.grad.double()) < (1e-4 if dtype == torch.float32 else 0.2), name


@pytest.mark.parametrize("name", BUILT)
def test_every_small_network_computes_the_same_with_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse.TritonConv2d, "precision", DTYPES[0])
    torch.manual_seed(0)
    plain = registry.models[name].build().to(DEVICE, memory_format=torch.channels_last)
    quick, x = copy.deepcopy(plain), draw_images(2, 3, 32, 32)
    assert fuse.fuse_model(quick, x[:1])
    found = []
    for model in (quick, plain):
        torch.manual_seed(1)  # dropout
        with torch.no_grad(), torch.autocast(DEVICE, DTYPES[0], enabled=GPU):
            found.append(model.train()(x))
    assert measure_error(found[0], found[1].double()) < (0.1 if GPU else 1e-4)
