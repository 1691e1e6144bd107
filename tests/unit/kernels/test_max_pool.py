"""2 x 2 max-pooling against torch's, to the bit: on a GPU as it is used, elsewhere by Triton's interpreter."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from cifar import registry
from cifar.kernels import fuse
from cifar.kernels.triton import max_pool
from helpers.kernels import (
    DEVICE,
    DTYPES,
    GPU,
    draw_images,
    forget_verifications,
    measure_error,
    record_verifications,
    slow_here,
)

pytestmark = pytest.mark.usefixtures("interpreted")

SHAPES = [(1, 64, 31, 31), (3, 8, 4, 6), (5, 24, 7, 7), (2, 384, 3, 5), (2, 16, 2, 3), (1, 8, 9, 2), (40, 8, 3, 4)]


def pooled(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By torch on the CPU, in single precision as nothing is rounded: values, which of the four each is, the gradient."""
    leaf = x.detach().cpu().float().contiguous().requires_grad_()
    y, at = nn.functional.max_pool2d(leaf, 2, return_indices=True)
    y.backward(g.cpu().float())
    assert leaf.grad is not None
    width = x.shape[3]
    found = y.detach().to(x.dtype), (at // width % 2 * 2 + at % width % 2).to(torch.int8), leaf.grad.to(x.dtype)
    return tuple(tensor.to(x.device) for tensor in found)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, kind: str = "random") -> tuple[Tensor, Tensor]:
    """Images, many with equal values or NaN in a square where `kind` says so, and a gradient."""
    torch.manual_seed(0)
    x, g = draw_images(*shape), draw_images(*shape[:2], shape[2] // 2, shape[3] // 2, dtype=dtype)
    if kind == "ties":
        x = x.round().clamp(-1, 1)
    if kind == "nan":
        x[torch.rand_like(x) < 0.3] = float("nan")
        x[torch.rand_like(x) < 0.3] = -float("inf")
    return x.to(dtype), g


def alike(ours: Tensor, theirs: Tensor) -> bool:
    """Whether all bits are the same, those of zeros too; one NaN is as good as another."""
    if not ours.is_floating_point():
        return torch.equal(ours, theirs)
    kind = torch.int16 if ours.dtype.itemsize == 2 else torch.int32
    values = [tensor.nan_to_num(7.0).view(kind) for tensor in (ours, theirs)]
    return torch.equal(*values) and torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "ties", "nan"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_kernel_has_torchs_bits(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    x, g = drawn(shape, dtype, kind)
    wanted, places, gradient = pooled(x, g)
    y, which = max_pool.max_pool_2x2_triton(x)
    assert alike(y, wanted) and torch.equal(which, places)
    images = max_pool.max_pool_2x2_input_grad_triton(g, which, *shape[2:])
    assert torch.equal(images, gradient), "every pixel, an odd last row and column too"
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (y, which, images))
    fallback = *max_pool.max_pool_2x2_reference(x), max_pool.max_pool_2x2_input_grad_reference(g, which, *shape[2:])
    for ours, theirs in zip((y, which, images), fallback, strict=True):
        assert alike(ours, theirs) and ours.stride() == theirs.stride()


@pytest.mark.parametrize("share", [max_pool.PoolTile(256, 64, 1), max_pool.PoolTile(2048, 128, 4)], ids=str)
def test_channels_that_several_programs_share(share: max_pool.PoolTile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(max_pool, "FORWARD_TILE", share)
    monkeypatch.setattr(max_pool, "BACKWARD_TILE", share)
    x, g = drawn((3, 200, 5, 7), DTYPES[0], "ties")
    wanted, places, gradient = pooled(x, g)
    y, which = max_pool.max_pool_2x2_triton(x)
    assert torch.equal(y, wanted) and torch.equal(which, places)
    assert torch.equal(max_pool.max_pool_2x2_input_grad_triton(g, which, 5, 7), gradient)


@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
@pytest.mark.parametrize(("shape", "ours"), [((2, 16, 7, 6), True), ((2, 8, 2, 2), True), ((2, 12, 5, 4), False)])
def test_the_operator_has_torchs_gradient_whoever_computes_it(shape: tuple[int, ...], ours: bool, last: bool) -> None:
    x, g = drawn(shape, DTYPES[0], "ties")
    x, g = (x, g) if last else (x.contiguous(), g.contiguous())
    can_use = max_pool.verifier.can_use
    assert can_use("forward", x, shape[1]) == can_use("input_grad", g, shape[1], shape=shape) == ours
    torch.library.opcheck(max_pool.max_pool_2x2, (x,), test_utils="test_faketensor")
    which = max_pool.max_pool_2x2(x)[1]
    torch.library.opcheck(max_pool.max_pool_2x2_input_grad, (g, which, *shape[2:]), test_utils="test_faketensor")
    wanted, _, gradient = pooled(x, g)
    leaf = x.clone().requires_grad_()
    y, which = max_pool.max_pool_2x2(leaf)
    assert not which.requires_grad
    y.backward(g)
    assert torch.equal(y, wanted) and leaf.grad is not None and torch.equal(leaf.grad, gradient)
    with torch.inference_mode():
        assert torch.equal(max_pool.max_pool_2x2(x)[0], wanted)


def test_what_32_bits_do_not_count_is_torchs() -> None:
    x = torch.empty(1, 8, 2, 2, device=DEVICE, dtype=DTYPES[0])
    assert max_pool.verifier.can_use("forward", x, 8, shape=(1, 8, 2, 2))
    assert not max_pool.verifier.can_use("forward", x, 8, shape=(2**26, 8, 2, 2))
    assert not max_pool.verifier.can_use("forward", x, 4, shape=(1, 4, 2, 2)), "nor channels that are no multiple of eight"


@pytest.mark.parametrize("kind", ["forward", "input_grad"])
def test_a_wrong_kernel_is_found_out_and_not_used(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, g = drawn((2, 16, 7, 7), DTYPES[0])
    forget_verifications(monkeypatch, max_pool)
    assert max_pool.verifier.can_use(kind, x, 16, shape=x.shape)
    forget_verifications(monkeypatch, max_pool)
    name = "max_pool_2x2_triton" if kind == "forward" else "max_pool_2x2_input_grad_triton"
    right = getattr(max_pool, name)

    def wrong(*given: Tensor) -> object:
        made = right(*given)
        return (made[0], made[1] ^ 1) if kind == "forward" else made.nan_to_num() + 1  # the neighbour's place

    monkeypatch.setattr(max_pool, name, wrong)
    assert not max_pool.verifier.can_use(kind, x, 16, shape=x.shape)
    leaf = x.clone().requires_grad_()
    max_pool.max_pool_2x2(leaf)[0].backward(g)
    assert leaf.grad is not None and torch.equal(leaf.grad, pooled(x, g)[2])


def test_only_halving_pools_are_exchanged_and_only_used_where_kernels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = [nn.MaxPool2d(2), nn.MaxPool2d((2, 2), stride=(2, 2)), nn.MaxPool2d(3), nn.MaxPool2d(2, stride=1)]
    pools += [nn.MaxPool2d(2, padding=1), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(2, dilation=2)]
    behind = nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.MaxPool2d(2)  # of a pool, of a norm: not of a convolution
    layers = [layer for pool in pools for layer in (nn.Conv2d(8, 8, 1), pool)]
    model = nn.Sequential(*layers, *behind).to(DEVICE)
    fuse.fuse_model(model, draw_images(1, 8, 640, 640))
    assert not any(type(layer) is fuse.TritonMaxPool2d for layer in model), "with few channels it is not known to be worth it"
    monkeypatch.setattr(fuse, "MIN_POOL_CHANNELS", 8)
    assert fuse.fuse_model(model, draw_images(1, 8, 640, 640)) == 0
    assert [type(pool) is fuse.TritonMaxPool2d for pool in pools] == [True, True, *[False] * 5]
    assert not any(type(layer) is fuse.TritonMaxPool2d for layer in behind)
    used: list[torch.Size] = []
    monkeypatch.setattr(fuse, "max_pool_2x2", lambda x: used.append(x.shape) or max_pool.max_pool_2x2(x))
    x = draw_images(2, 8, 7, 6, dtype=DTYPES[0])
    others = x[:, :4], x[0], x.double()  # channels, no batch, precision
    for given in (x, *others):
        assert torch.equal(pools[0](given), nn.functional.max_pool2d(given, 2))
    assert not used, "without autocast"
    monkeypatch.setattr(fuse.TritonConv2d, "precision", DTYPES[0])
    with torch.autocast(DEVICE, torch.bfloat16):
        for given in (x, *others):
            assert torch.equal(pools[0](given), nn.functional.max_pool2d(given, 2))
        with torch.inference_mode():
            assert torch.equal(pools[0](x), nn.functional.max_pool2d(x, 2))
    assert used == [x.shape] * 2


@pytest.mark.parametrize("name", ["airbench94", "airbench96"])
def test_the_fast_networks_learn_the_same_with_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, "MIN_POOL_CHANNELS", 8)
    monkeypatch.setattr(fuse.TritonConv2d, "precision", DTYPES[0])
    proved = record_verifications(monkeypatch, max_pool)
    torch.manual_seed(0)
    plain = registry.models[name].build(width=8).to(DEVICE, memory_format=torch.channels_last).train()
    quick, x, labels = copy.deepcopy(plain), draw_images(4, 3, 32, 32), torch.arange(4, device=DEVICE)
    fuse.fuse_model(quick, x[:1])
    assert sum(type(module) is fuse.TritonMaxPool2d for module in quick.modules()) == 3
    for model in (plain, quick):
        with torch.autocast(DEVICE, DTYPES[0], enabled=GPU):
            loss = nn.functional.cross_entropy(model(x).float(), labels)
        loss.backward()
    assert proved == [True] * 6, "three sizes, there and back"
    for (kind, ours), wanted in zip(quick.named_parameters(), plain.parameters(), strict=True):
        if wanted.requires_grad:
            assert ours.grad is not None and wanted.grad is not None
            assert torch.equal(ours.grad, wanted.grad) or (GPU and measure_error(ours.grad, wanted.grad.double()) < 0.05), kind
    with torch.inference_mode(), torch.autocast(DEVICE, DTYPES[0], enabled=GPU):
        found, wanted = quick.eval()(x), plain.eval()(x)
    assert torch.equal(found, wanted) or (GPU and measure_error(found, wanted.double()) < 0.05)


@pytest.mark.parametrize("dtype", [slow_here(DTYPES[0])], ids=str)
def test_compiled_and_before_batch_norm_it_learns_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, "MIN_POOL_CHANNELS", 8)
    monkeypatch.setattr(fuse.TritonConv2d, "precision", dtype)
    proved = record_verifications(monkeypatch, max_pool)
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 2, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.GELU(), nn.Flatten(), nn.Linear(144, 10)
    plain = nn.Sequential(*layers).to(DEVICE, memory_format=torch.channels_last)
    quick, x, labels = copy.deepcopy(plain), draw_images(8, 3, 8, 8), torch.arange(8, device=DEVICE)
    fuse.fuse_model(quick, x[:1])

    def loss(model: nn.Module) -> Tensor:
        with torch.autocast(DEVICE, dtype, enabled=GPU):
            return nn.functional.cross_entropy(model(x).float(), labels)

    loss(plain).backward()
    torch.compile(loss, dynamic=False)(quick).backward()
    assert proved == [True] * 2, "there and back"
    for (name, wanted), ours in zip(plain.named_parameters(), quick.parameters(), strict=True):
        assert ours.grad is not None and wanted.grad is not None
        assert ours.grad.stride() == wanted.grad.stride()
        assert measure_error(ours.grad, wanted.grad.double()) < (0.2 if GPU else 1e-4), name
