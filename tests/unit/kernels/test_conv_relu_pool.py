"""Convolution, bias, ReLU and pooling as one kernel, against torch's: on a GPU as it is used, elsewhere by the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from cifar import registry
from cifar.kernels import fuse
from cifar.kernels.triton import conv3x3, conv_relu_pool
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

SHAPES = [(3, 16, 8, 8), (16, 16, 8, 8), (3, 5, 12, 10), (8, 16, 8, 6), (1, 64, 8, 4)]
SHAPES += [slow_here(16, 32, 4, 6), slow_here(32, 64, 4, 8)]


def drawn(inner: int, outer: int, height: int, width: int, dtype: torch.dtype, count: int = 3) -> tuple[Tensor, ...]:
    """x, weight, bias, and a gradient of what comes out."""
    torch.manual_seed(0)
    x, g = (
        draw_images(count, inner, height, width, dtype=dtype),
        draw_images(count, outer, height // 2, width // 2, dtype=dtype),
    )
    weight = draw_images(outer, inner, 3, 3, dtype=dtype).float() / (9 * inner) ** 0.5
    return x, weight.to(dtype).float(), torch.randn(outer, device=DEVICE), g


def exactly(x: Tensor, weight: Tensor, bias: Tensor, g: Tensor, which: Tensor) -> tuple[Tensor, ...]:
    """In double precision: all pixels of each square before pooling, and the gradients when `which` takes them."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    full = nn.functional.conv2d(*leaves, padding=1)
    squares = torch.stack([full[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)])
    chosen = squares.gather(0, which.long().clamp(max=3)[None])[0] * (which != conv_relu_pool.NO_ARGMAX)
    chosen.backward(g.double())
    return squares.detach(), chosen.detach(), *(leaf.grad for leaf in leaves)


def check(found: tuple[Tensor, ...], given: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """found: values, which, and the gradients of x, weight and bias."""
    y, which, x_grad, filters, bias = found
    squares, chosen, *exact = exactly(*given, which)
    tolerance = TOLERANCE[dtype]
    assert ((which >= 0) & (which <= conv_relu_pool.NO_ARGMAX)).all()
    assert measure_error(y, chosen) < tolerance, "the value of the pixel that `which` names"
    assert measure_error(y, squares.amax(0).relu()) < tolerance, "and no other is larger"
    assert ((y == 0) == (which == conv_relu_pool.NO_ARGMAX)).all()
    for ours, wanted in zip((x_grad, filters, bias), exact, strict=True):
        assert measure_error(ours, wanted) < max(tolerance, 1e-5)


@BY_DTYPE
@pytest.mark.parametrize(("inner", "outer", "height", "width"), SHAPES)
def test_each_kernel_is_right_in_double_precision(inner: int, outer: int, height: int, width: int, dtype: torch.dtype) -> None:
    x, weight, bias, g = drawn(inner, outer, height, width, dtype)
    y, which = conv_relu_pool.convolve_relu_pool_triton(x, weight, bias)
    flat = conv_relu_pool.convolve_relu_pool_weight_grad_triton(x, g, which)
    filters = flat[: weight.numel()].view(outer, 3, 3, inner).permute(0, 3, 1, 2)
    found = y, which, conv_relu_pool.convolve_relu_pool_input_grad_triton(g, which, weight), filters, flat[weight.numel() :]
    check(found, (x, weight, bias, g), dtype)
    theirs = conv_relu_pool.convolve_relu_pool_reference(x, weight, bias)
    assert measure_error(y, theirs[0].double()) < 2 * TOLERANCE[dtype]
    assert (which == theirs[1]).float().mean() > 0.98, "torch takes another pixel only where two are nearly equal"


@pytest.mark.parametrize(("inner", "outer", "height"), [(3, 16, 8), slow_here(32, 64, 4), (64, 64, 8), (16, 16, 6)])
def test_the_operator_has_torchs_gradients_whoever_computes_them(inner: int, outer: int, height: int) -> None:
    dtype = DTYPES[0]
    x, weight, bias, g = drawn(inner, outer, height, 8, dtype)
    torch.library.opcheck(conv_relu_pool.convolve_relu_pool, (x, weight, bias), test_utils="test_faketensor")
    which = conv_relu_pool.convolve_relu_pool(x, weight, bias)[1]
    torch.library.opcheck(conv_relu_pool.convolve_relu_pool_input_grad, (g, which, weight), test_utils="test_faketensor")
    torch.library.opcheck(conv_relu_pool.convolve_relu_pool_weight_grad, (x, g, which), test_utils="test_faketensor")
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    y, which = conv_relu_pool.convolve_relu_pool(*leaves)
    y.backward(g)
    assert leaves[1].grad.stride() == weight.stride() == weight.contiguous(memory_format=torch.channels_last).stride()
    check((y.detach(), which, *(leaf.grad for leaf in leaves)), (x, weight, bias, g), dtype)


@pytest.mark.parametrize("kind", ["forward", "input_grad", "weight_grad"])
def test_a_wrong_kernel_is_found_out_and_not_used(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _, g = drawn(16, 16, 8, 8, DTYPES[0])
    given = {"forward": ("forward", x, 16, weight.stride(), x.shape),
             "input_grad": ("input_grad", g, 16, weight.stride(), x.shape),
             "weight_grad": ("weight_grad", x, 16, (), x.shape)}[kind]  # fmt: skip
    forget_verifications(monkeypatch, conv_relu_pool)
    assert conv_relu_pool.verifier.can_use(*given)
    forget_verifications(monkeypatch, conv_relu_pool)
    name = "convolve_relu_pool_triton" if kind == "forward" else f"convolve_relu_pool_{kind}_triton"
    right = getattr(conv_relu_pool, name)

    def wrong(*tensors: Tensor) -> object:
        made = right(*tensors)
        return (made[0], made[1] ^ 1) if kind == "forward" else made * 1.05  # the neighbour's place

    monkeypatch.setattr(conv_relu_pool, name, wrong)
    assert not conv_relu_pool.verifier.can_use(*given)


@pytest.mark.slow
def test_programs_that_go_through_many_blocks_and_end_in_half_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (conv3x3, conv_relu_pool):
        monkeypatch.setattr(module, "count_multiprocessors", lambda device: 1)
    x, weight, bias, g = drawn(16, 16, 12, 12, DTYPES[0], count=41)
    num_strips = x.shape[0] * 12 * 12 // conv3x3.STRIP_ROWS
    for config in (
        conv_relu_pool.FORWARD_CONFIGS[64],
        conv_relu_pool.INPUT_GRAD_CONFIGS[16],
        conv_relu_pool.WEIGHT_GRAD_CONFIGS[64],
    ):
        assert num_strips > 2 * config.block * choose_num_programs(config, num_strips, 1) and num_strips % config.block
    y, which = conv_relu_pool.convolve_relu_pool_triton(x, weight, bias)
    flat = conv_relu_pool.convolve_relu_pool_weight_grad_triton(x, g, which)
    filters = flat[: weight.numel()].view(16, 3, 3, 16).permute(0, 3, 1, 2)
    check(
        (y, which, conv_relu_pool.convolve_relu_pool_input_grad_triton(g, which, weight), filters, flat[weight.numel() :]),
        (x, weight, bias, g),
        DTYPES[0],
    )


def test_what_is_not_finite_stays_so() -> None:
    x, weight, bias, _ = drawn(3, 16, 8, 8, DTYPES[0])
    x[0, 0, 1, 1] = float("nan")
    y, _ = conv_relu_pool.convolve_relu_pool_triton(x, weight, bias)
    wanted, _ = conv_relu_pool.convolve_relu_pool_reference(x, weight, bias)
    assert wanted.isnan().any() and torch.equal(y.isnan(), wanted.isnan())
    bias[3] = float("inf")
    assert torch.equal(
        conv_relu_pool.convolve_relu_pool_triton(x, weight, bias)[0].isinf(),
        conv_relu_pool.convolve_relu_pool_reference(x, weight, bias)[0].isinf(),
    )


def test_only_a_bias_a_relu_and_a_halving_pool_in_a_row_are_taken_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse.TritonConv2d, "precision", DTYPES[0])

    def row(*parts: nn.Module, first: nn.Module | None = None) -> nn.Sequential:
        return nn.Sequential(first or nn.Conv2d(3, 16, 3, padding=1), *parts).to(DEVICE).train()

    taken = row(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    plain_ones = [
        row(nn.ReLU(), nn.MaxPool2d(3)),
        row(nn.ReLU(), nn.MaxPool2d(2, stride=1)),
        row(nn.ReLU(), nn.MaxPool2d(2, padding=1)),
        row(nn.ReLU(), nn.AvgPool2d(2)),
        row(nn.GELU(), nn.MaxPool2d(2)),
        row(nn.MaxPool2d(2), nn.ReLU()),
        row(nn.ReLU(), nn.MaxPool2d(2), first=nn.Conv2d(3, 16, 3, padding=1, bias=False)),
    ]
    x = draw_images(2, 3, 8, 8)
    for model in (taken, *plain_ones):
        with torch.no_grad(), torch.autocast(DEVICE, DTYPES[0], enabled=GPU):
            before, names = model(x), list(model.state_dict())
            assert fuse.fuse_model(model, x[:1]) == 1
            after = model(x)
        with torch.inference_mode(), torch.autocast(DEVICE, DTYPES[0], enabled=GPU):
            evaluated = model.eval()(x)
        with torch.no_grad():
            whole = model(x)  # without autocast
        assert (type(model[0]) is fuse.FusedConvReLUPool) == (model is taken)
        assert list(model.state_dict()) == names
        for found in (after, evaluated, whole):
            assert measure_error(found, before.double()) < (0.02 if GPU else 1e-5)


class Tapped(nn.Module):
    """Looks at what its convolution made, beside what its row of layers makes of that."""

    def __init__(self, part: slice) -> None:
        super().__init__()
        self.part, self.row = part, nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.row[self.part](x)
        return self.row(x).mean() + inner.mean() if self.part.stop == 1 else self.row[self.part.stop :](inner).mean()


def test_modules_that_are_used_elsewhere_too_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse.TritonConv2d, "precision", DTYPES[0])
    relu, pool = nn.ReLU(), nn.MaxPool2d(2)
    shared = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), relu, pool, nn.Conv2d(16, 64, 3, padding=1), relu, nn.Flatten())
    pools = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), pool, nn.Conv2d(16, 64, 1), pool)
    hooked = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    hooked[1].register_forward_hook(lambda module, given, made: made * 2)
    for model in (shared, pools, hooked, Tapped(slice(0, 1)), Tapped(slice(0, 2))):
        x = draw_images(2, 3, 8, 8)
        with torch.no_grad(), torch.autocast(DEVICE, DTYPES[0], enabled=GPU):
            before = model.to(DEVICE).train()(x)
            fuse.fuse_model(model, x[:1])
            after = model(x)
        assert not any(isinstance(module, fuse.FusedConvReLUPool | fuse.FusedAwayReLU) for module in model.modules())
        assert measure_error(after, before.double()) < (0.02 if GPU else 1e-5)


@pytest.mark.parametrize("dtype", [slow_here(DTYPES[0])], ids=str)
def test_a_compiled_worksheet_learns_what_torchs_layers_learn(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse.TritonConv2d, "precision", dtype)
    proved = record_verifications(monkeypatch, conv_relu_pool)
    models = []
    for _ in range(3):
        torch.manual_seed(0)
        built = registry.models["worksheet1"].build(width=8).to(DEVICE, memory_format=torch.channels_last)
        models.append(built.train())
    quick, layers, exact = models
    x, labels = draw_images(4, 3, 32, 32), torch.arange(4, device=DEVICE)
    assert fuse.fuse_model(quick, x[:1]) == 2

    def loss(model: nn.Module, kind: torch.dtype = dtype) -> Tensor:
        with torch.autocast(DEVICE, kind, enabled=kind != torch.float32):
            logits = model(x.to(kind))
        return nn.functional.cross_entropy(logits.float(), labels)

    torch.compile(loss, dynamic=False)(quick).backward()
    assert proved == [True] * 5, "two forward, one for the images' gradient, two for the filters'"
    loss(layers).backward()
    loss(exact, torch.float32).backward()
    for (name, ours), theirs, wanted in zip(quick.named_parameters(), layers.parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and wanted.grad is not None
        assert ours.grad.stride() == theirs.grad.stride()
        off = measure_error(theirs.grad, wanted.grad.double())  # of torch's layers in this precision
        assert measure_error(ours.grad, wanted.grad.double()) < max(2 * off, 1e-5), name
