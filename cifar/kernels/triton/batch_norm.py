"""BatchNorm of images in training, with the ReLU that follows it, for compiled steps on a GPU.

A compiler makes its sums in two kernels, reads the ReLU's result again for the gradient, and does not know that the convolution
has just had every value in its registers. Here the convolution sums up what it writes, the gradient works out again where
the ReLU let something pass, and what is left, one multiplication and addition a value, stays the compiler's to fuse.

Mean and variance are of the values as they are stored, like torch's. The sums are taken of x - pivot (Chan, Golub & LeVeque
1983, "Algorithms for computing the sample variance"): with the running mean as the pivot nothing is cancelled that matters
once that is near; before, the variance of values whose mean is 30 deviations from zero is wrong by 0.03 %.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from cifar.kernels.triton.batch_norm_kernels import add_moments, sum_gradients, sum_pixels
from cifar.kernels.triton.conv3x3 import (
    MOST_PROVED,
    SIDE,
    How,
    Shape,
    added,
    as_last,
    convolve,
    correlate,
    few,
    meant,
    near,
    our_convolve_sums,
    processors,
    programs_of,
    rounded,
    shared,
    torch_convolve,
    works,
)

MOST = 64  # channels; for more it is not known to be worth it
# shapes of the kernels, by measurement (LOG.md); a block's pixels times their channels, rounded up, are `block` values
PIXELS, GRADIENTS = How(4096, 2, 1, 4), {True: How(4096, 2, 1, 4), False: How(8192, 8, 1, 2)}  # by whether there is a ReLU
FINISH = 128, 4  # rows that are added at once, and columns a program


# -- our kernels, and the same by torch --------------------------------------------------------------------------------


def _blocks(shape: Shape, how: How, processors: int) -> tuple[int, int, int]:
    """Pixels, pixels a block, and how many programs are quickest, where so many run at once."""
    count, channels, height, width = shape
    pixels, block = count * height * width, how.block // rounded(channels)
    return pixels, block, programs_of(how._replace(block=block), pixels, processors)


def summing(shape: Shape, processors: int) -> int:
    """How many programs are quickest for `pixel_sums`."""
    return _blocks(shape, PIXELS, processors)[2]


def our_pixel_sums(x: Tensor, pivot: Tensor, programs: int) -> Tensor:
    """`pixel_sums` by our kernel."""
    x = as_last(x)
    pixels, block, _ = _blocks(x.shape, PIXELS, 1)
    parts = x.new_empty((programs, 2, x.shape[1]), dtype=torch.float32)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        shape = x.shape[1], rounded(x.shape[1]), block
        sum_pixels[(programs,)](x, pivot, parts, pixels, programs, *shape, num_warps=PIXELS.warps, num_stages=PIXELS.stages)
    return parts


def our_statistics(
    parts: Tensor, running_mean: Tensor, running_variance: Tensor, batches: Tensor, pixels: int, momentum: float
) -> Tensor:
    """`statistics` by our kernel."""
    programs, _, size = parts.shape
    found = parts.new_empty((2, size))
    given = parts, running_mean, running_variance, batches, found, pixels, programs, momentum, pixels / max(pixels - 1, 1)
    with torch.cuda.device_of(parts):  # type: ignore[no-untyped-call]
        add_moments[(triton.cdiv(size, FINISH[1]),)](*given, size, *FINISH, num_warps=4)
    return found


def our_gradient_sums(g: Tensor, x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool) -> Tensor:
    """`gradient_sums` by our kernels."""
    g, x, how = as_last(g), as_last(x), GRADIENTS[relu]
    pixels, block, programs = _blocks(x.shape, how, processors(x.device))
    parts = x.new_empty((programs, 2, x.shape[1]), dtype=torch.float32)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        shape = relu, x.shape[1], rounded(x.shape[1]), block
        sum_gradients[(programs,)](
            g, x, moments, weight, bias, parts, pixels, programs, eps, *shape, num_warps=how.warps, num_stages=how.stages
        )
    return added(parts.flatten(1)).view(2, x.shape[1])


def _finite(pivot: Tensor) -> Tensor:
    return torch.where(pivot.isfinite(), pivot, 0.0)


def torch_pixel_sums(x: Tensor, pivot: Tensor, programs: int) -> Tensor:
    """`pixel_sums` by torch: all of them in the first program's place."""
    off = x.float() - _along(_finite(pivot))
    first = torch.stack([off.sum((0, 2, 3)), off.square().sum((0, 2, 3))])
    return torch.cat([first[None], first.new_zeros((programs - 1, *first.shape))])


def torch_statistics(
    parts: Tensor, running_mean: Tensor, running_variance: Tensor, batches: Tensor, pixels: int, momentum: float
) -> Tensor:
    """`statistics` by torch."""
    first, second = parts.sum(0) / pixels
    found = torch.stack([_finite(running_mean) + first, (second - first.square()).clamp_min(0)])
    running_mean.lerp_(found[0], momentum)
    running_variance.lerp_(found[1] * (pixels / max(pixels - 1, 1)), momentum)
    batches.add_(1)
    return found


def torch_gradient_sums(g: Tensor, x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool) -> Tensor:
    """`gradient_sums` by torch."""
    passed, off, rest = _passed(g, x, moments, weight, bias, eps, relu)
    return torch.stack([passed.sum((0, 2, 3)), (passed * off * rest).sum((0, 2, 3))])


def _along(value: Tensor) -> Tensor:
    return value[:, None, None]


def _passed(
    g: Tensor, x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient behind the ReLU, x - mean, and 1 / standard deviation (C, 1, 1); all float32."""
    off, rest = x.float() - _along(moments[0]), _along(torch.rsqrt(moments[1] + eps))
    g = g.float()
    return torch.where(off * (rest * _along(weight)) + _along(bias) > 0, g, 0.0) if relu else g, off, rest


# -- operators ---------------------------------------------------------------------------------------------------------


def _ours(kind: str, x: Tensor, outer: int, more: tuple[Any, ...] = ()) -> bool:
    """Whether our kernels are taken for these images."""
    shape = min(len(x), MOST_PROVED), *x.shape[1:]
    suits = few(x.shape, outer) and outer <= MOST and (kind != "convolve" or meant(x.shape[1], outer, *x.shape[2:]))
    return suits and _right(kind, shape, outer, more, x.dtype, x.device)


@functools.cache
def _right(kind: str, shape: Shape, outer: int, more: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether our kernels give torch's answer on this device."""
    seeded = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=seeded, device=device)

    def agree() -> bool:
        # every channel and every image has a mean of its own, so that it matters which values are summed
        x = draw(*shape) * (1 + draw(shape[1], 1, 1).abs()) + 0.1 * draw(shape[0], shape[1], 1, 1)
        if kind == "gradients":
            x, g = as_last(x.to(dtype)), as_last((draw(*shape) + 0.1 * draw(shape[0], shape[1], 1, 1)).to(dtype))
            given = g, x, torch.stack([draw(outer), draw(outer).square() + 0.1]), draw(outer), draw(outer), *more
            return all(map(near, our_gradient_sums(*given), torch_gradient_sums(*given)))
        if kind == "pixels":
            middle = draw(outer)
            x, pivot = as_last((x + _along(middle)).to(dtype)), middle + 0.05 * draw(outer)
            y, parts = x, our_pixel_sums(x, pivot, summing(x.shape, processors(device)))
        else:
            x = as_last(x.to(dtype))
            weight = torch.empty_strided((outer, shape[1], SIDE, SIDE), more, device=device)
            weight.copy_(draw(*weight.shape).to(dtype))
            wanted = torch_convolve(x.float(), weight, False)
            pivot = wanted.mean((0, 2, 3)) + 0.05 * draw(outer) * wanted.std((0, 2, 3))
            y, parts = our_convolve_sums(x, weight, pivot, shared(x.shape, outer, processors(device)))
            if not near(y, wanted):
                return False
        return all(map(near, parts.sum(0), torch_pixel_sums(y, pivot, 1).sum(0)))

    return works(agree)


@functools.cache
def _adds_up(programs: int, size: int, device: torch.device) -> bool:
    """Whether our kernel makes torch's statistics of so many programs' sums on this device."""
    seeded = torch.Generator(device).manual_seed(0)

    def agree() -> bool:
        parts = torch.randn((programs, 2, size), generator=seeded, device=device)
        parts += torch.tensor([1.0, 9.0], device=device)[:, None] + 0.1 * torch.arange(size, device=device)
        mean, variance = torch.rand((2, size), generator=seeded, device=device)
        found = []
        for by in (our_statistics, torch_statistics):
            running = mean.clone(), variance.clone(), torch.full((), 7, device=device)
            moments = by(parts, *running, 2 * programs, 0.5)
            found.append([*moments, running[0] - mean, running[1] - variance, running[2].float()])
        return all(map(near, *found))

    return works(agree)


@torch.library.custom_op("cifar::pixel_sums", mutates_args=())
def pixel_sums(x: Tensor, pivot: Tensor, programs: int) -> Tensor:
    """Sums of x - pivot and of its square, some pixels each: x (N, C, H, W), pivot (C,) float32 -> (programs, 2, C) float32."""
    by = our_pixel_sums if _ours("pixels", x, x.shape[1]) else torch_pixel_sums
    return by(x, pivot, programs)


@pixel_sums.register_fake
def _(x: Tensor, pivot: Tensor, programs: int) -> Tensor:
    return torch.empty((programs, 2, x.shape[1]), dtype=torch.float32, device=x.device)


@torch.library.custom_op("cifar::convolve_3x3_sums", mutates_args=())
def convolve_sums(x: Tensor, weight: Tensor, pivot: Tensor, programs: int) -> tuple[Tensor, Tensor]:
    """`conv3x3.convolve`, and `pixel_sums` of its result. The sums have no gradient: `normalised` has it."""
    if _ours("convolve", x, len(weight), weight.stride()):
        return our_convolve_sums(x, weight, pivot, programs)
    y = convolve(x, weight, False)
    return y, torch_pixel_sums(y, pivot, programs)


@convolve_sums.register_fake
def _(x: Tensor, weight: Tensor, pivot: Tensor, programs: int) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, torch.empty((programs, 2, shape[1]), dtype=torch.float32, device=x.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, weight = ctx.saved_tensors
    images = convolve(g, weight, True) if ctx.needs_input_grad[0] else None
    return images, correlate(x, g) if ctx.needs_input_grad[1] else None, None, None


convolve_sums.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("cifar::statistics", mutates_args=("running_mean", "running_variance", "batches"))
def statistics(
    parts: Tensor, running_mean: Tensor, running_variance: Tensor, batches: Tensor, pixels: int, momentum: float
) -> Tensor:
    """Mean and (biased) variance of so many pixels, (2, C) float32, from their sums with running_mean as the pivot.

    BatchNorm's running statistics (C,), and the number of batches they are from, are taken on from there, as torch does.
    """
    by = our_statistics if _adds_up(parts.shape[0], parts.shape[2], parts.device) else torch_statistics
    return by(parts, running_mean, running_variance, batches, pixels, momentum)


@statistics.register_fake
def _(parts: Tensor, running_mean: Tensor, running_variance: Tensor, batches: Tensor, pixels: int, momentum: float) -> Tensor:
    return torch.empty(parts.shape[1:], dtype=torch.float32, device=parts.device)


@torch.library.custom_op("cifar::gradient_sums", mutates_args=())
def gradient_sums(g: Tensor, x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool) -> Tensor:
    """Each channel's sums of g and of g * (x - mean) / deviation, (2, C): what its bias and its weight have as gradients.

    `relu`: only where what came of x is above zero.
    """
    ours = _ours("gradients", x, x.shape[1], (eps, relu))
    return (our_gradient_sums if ours else torch_gradient_sums)(g, x, moments, weight, bias, eps, relu)


@gradient_sums.register_fake
def _(g: Tensor, x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool) -> Tensor:
    return torch.empty((2, x.shape[1]), dtype=torch.float32, device=x.device)


@torch.library.triton_op("cifar::normalised", mutates_args=())
def normalised(x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool) -> Tensor:
    """x (N, C, H, W) less the mean, over the standard deviation, times weight, plus bias, in x's precision; `relu`: and ReLU.

    moments (2, C): of x. The gradient of x is that of both: what the moments owe to x is in it. No kernel is in here, but
    as a "triton_op" a compiler looks into it, which it does not with other operators that bring their own gradient.
    """
    rest = _along(torch.rsqrt(moments[1] + eps))
    y = (x.float() - _along(moments[0])) * (rest * _along(weight)) + _along(bias)
    return (y.relu() if relu else y).to(x.dtype)


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.eps, ctx.relu = inputs[4:]


def _normalised_backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None, None]:
    x, moments, weight, bias = ctx.saved_tensors
    g, count = as_last(g), x.numel() // x.shape[1]
    sums = gradient_sums(g, x, moments, weight, bias, ctx.eps, ctx.relu)
    passed, off, rest = _passed(g, x, moments, weight, bias, ctx.eps, ctx.relu)
    images = rest * _along(weight) * (passed - _along(sums[0] / count) - off * rest * _along(sums[1] / count))
    return images.to(x.dtype), None, sums[1], sums[0], None, None


normalised.register_autograd(_normalised_backward, setup_context=_keep_all)
