"""3 x 3 convolution, bias, ReLU and 2 x 2 max-pooling as one operation.

Taken apart, a step of worksheet 1 writes and reads the large map of each convolution about eight times: bias and ReLU,
pooling, the gradients of both, the sums for the bias. Here that map is never in memory: the kernel keeps of each square the
largest value and which of the four it was (0 to 3; 4 where none is above zero), and the gradients of images, filters and
bias are made from those. Proved on the GPU before use and replaced by torch's where it is wrong, as in plain.py.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar.kernels.triton.conv3x3 import (
    LINES,
    MOST_IN,
    MOST_OUT,
    MOST_PROVED,
    SIDE,
    How,
    added,
    as_last,
    few,
    launch,
    near,
    processors,
    programs_of,
    rounded,
    torch_convolve,
    torch_correlate,
    turned,
    works,
)
from cifar.kernels.triton.conv_relu_pool_kernels import back_pool, convolve_pool, correlate_pool

NONE = 4  # of a square in which no value is above zero
FORWARD = {16: How(64, 4, 1, 4), 32: How(64, 4, 1, 4), 64: How(64, 4, 1, 4), 128: How(64, 4, 1, 2)}  # by TAPS
FILTERS = {16: How(64, 4, 1, 2), 32: How(64, 4, 2, 2), 64: How(64, 4, 3, 1), 128: How(64, 8, 1, 0.5)}  # by TAPS
BACK = {16: How(64, 4, 1, 2), 32: How(64, 4, 1, 1), 64: How(64, 4, 1, 1)}  # by channels of the result, rounded up


# -- our kernels, and the same by torch --------------------------------------------------------------------------------


def our_pooled(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`pooled` by our kernel."""
    x, outer = as_last(x), len(weight)
    shape = (len(x), outer, x.shape[2] // 2, x.shape[3] // 2)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    which = torch.empty_like(y, dtype=torch.int8)
    filters, strides = turned(weight, False)
    launch(convolve_pool, FORWARD[rounded(SIDE * x.shape[1])], x.shape, outer, (x, filters, bias, y, which), strides)
    return y, which


def our_images(g: Tensor, which: Tensor, weight: Tensor) -> Tensor:
    """`pooled_images` by our kernel."""
    g, which, outer = as_last(g), as_last(which), weight.shape[1]
    full = (len(g), g.shape[1], g.shape[2] * 2, g.shape[3] * 2)
    y = torch.empty((full[0], outer, *full[2:]), dtype=g.dtype, device=g.device, memory_format=torch.channels_last)
    filters, strides = turned(weight, True)
    taps = rounded(g.shape[1])
    launch(back_pool, BACK[rounded(outer)], full, outer, (g, which, filters, y), strides, taps=taps)
    return y


def our_filters(x: Tensor, g: Tensor, which: Tensor) -> Tensor:
    """`pooled_filters` by our kernel: each program's sum, and the sum of these."""
    x, g, which = as_last(x), as_last(g), as_last(which)
    inner, outer = x.shape[1], g.shape[1]
    how = FILTERS[rounded(SIDE * inner)]
    programs = programs_of(how, x.numel() // inner // LINES, processors(x.device))
    parts = torch.empty((programs, outer * (9 * inner + 1)), dtype=torch.float32, device=x.device)
    launch(correlate_pool, how, x.shape, outer, (x, g, which, parts), programs=programs)
    return added(parts)


def torch_pooled(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`pooled` by torch."""
    full = torch_convolve(x, weight, False)
    full = full + bias.to(full.dtype)[:, None, None]
    y, at = F.max_pool2d(full.relu(), 2, return_indices=True)
    width = full.shape[3]
    which = torch.where(y == 0, NONE, at // width % 2 * 2 + at % width % 2)
    return as_last(y), as_last(which.to(torch.int8))


def spread(g: Tensor, which: Tensor) -> Tensor:
    """Gradients of squares (N, C, H, W) -> of their pixels (N, C, 2 H, 2 W): all of it at one of the four."""
    full = g.new_zeros((*g.shape[:2], 2 * g.shape[2], 2 * g.shape[3])).contiguous(memory_format=torch.channels_last)
    for place in range(NONE):
        full[:, :, place // 2 :: 2, place % 2 :: 2] = torch.where(which == place, g, 0)
    return full


def torch_images(g: Tensor, which: Tensor, weight: Tensor) -> Tensor:
    """`pooled_images` by torch."""
    return torch_convolve(spread(g, which), weight, True)


def torch_filters(x: Tensor, g: Tensor, which: Tensor) -> Tensor:
    """`pooled_filters` by torch."""
    full = spread(g, which)
    weight, bias = torch_correlate(x, full), full.sum((0, 2, 3), dtype=torch.float32)
    return torch.cat([weight.permute(0, 2, 3, 1).reshape(-1), bias])


# -- operators ---------------------------------------------------------------------------------------------------------


def _ours(kind: str, x: Tensor, shape: tuple[int, ...], outer: int, strides: tuple[int, ...] = ()) -> bool:
    """Whether our kernel is taken. `shape`: of the convolution's images, `outer`: how many channels it makes of them."""
    proved = (min(shape[0], MOST_PROVED), *shape[1:])
    return halved(shape[1], outer, *shape[2:]) and few(shape, outer) and _right(kind, proved, outer, strides, x.dtype, x.device)


def halved(inner: int, outer: int, height: int, width: int) -> bool:
    """Whether our kernels are for such images."""
    return height % 4 == 0 and width % 2 == 0 and inner <= MOST_IN and outer <= MOST_OUT


@functools.cache
def _right(
    kind: str, shape: tuple[int, ...], outer: int, strides: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether our kernel gives torch's answer on this device, with images and filters that lie as they will."""
    seeded = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return as_last(torch.randn(shape, generator=seeded, device=device).to(dtype))

    squares = (shape[0], outer, shape[2] // 2, shape[3] // 2)

    def agree() -> bool:
        x, g = draw(*shape), draw(*squares)
        which = as_last(torch.randint(NONE + 1, squares, generator=seeded, device=device, dtype=torch.int8))
        if kind == "filters":
            return near(our_filters(x, g, which), torch_filters(x.float(), g.float(), which))
        weight = torch.empty_strided((outer, shape[1], SIDE, SIDE), strides, device=device)
        weight.copy_(draw(*weight.shape))
        if kind == "images":
            return near(our_images(g, which, weight), torch_images(g.float(), which, weight))
        bias = draw(outer, 1, 1, 1).float().flatten()
        y, which = our_pooled(x, weight, bias)
        wanted, _ = torch_pooled(x.float(), weight, bias)
        full = torch_convolve(x.float(), weight, False) + bias[:, None, None]
        # where two are nearly equal either may be the largest, so it is the value at that place that has to be right
        ones = spread(torch.ones_like(wanted), which)
        return near(y, wanted) and near(F.avg_pool2d(full * ones, 2) * NONE, wanted)

    return works(agree)


@torch.library.custom_op("cifar::convolve_relu_pool", mutates_args=())
def pooled(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """3 x 3 convolution (stride 1, zero padding of 1), bias, ReLU and 2 x 2 max-pooling, as in cifar.kernels.convolve.

    x (N, IN, H, W), weight (OUT, IN, 3, 3) and bias (OUT,) float32 -> (N, OUT, H / 2, W / 2), and of the same shape, int8:
    which of its square's four pixels (0, 1; 2, 3) each value is, 4 where none is above zero.
    """
    ours = _ours("pooled", x, tuple(x.shape), len(weight), weight.stride())
    return (our_pooled if ours else torch_pooled)(x, weight, bias)


@pooled.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    shape = (len(x), len(weight), x.shape[2] // 2, x.shape[3] // 2)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, torch.empty_like(y, dtype=torch.int8)


@torch.library.custom_op("cifar::convolve_relu_pool_images", mutates_args=())
def pooled_images(g: Tensor, which: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x from that of `pooled`'s values (N, OUT, H / 2, W / 2) -> (N, IN, H, W), channels last."""
    shape = (len(g), weight.shape[1], g.shape[2] * 2, g.shape[3] * 2)
    ours = _ours("images", g, shape, len(weight), weight.stride())
    return (our_images if ours else torch_images)(g, which, weight)


@pooled_images.register_fake
def _(g: Tensor, which: Tensor, weight: Tensor) -> Tensor:
    shape = (len(g), weight.shape[1], g.shape[2] * 2, g.shape[3] * 2)
    return torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=torch.channels_last)


@torch.library.custom_op("cifar::convolve_relu_pool_filters", mutates_args=())
def pooled_filters(x: Tensor, g: Tensor, which: Tensor) -> Tensor:
    """The gradients of weight, as (OUT, 3, 3, IN), and of bias, one after the other: (OUT * 9 * IN + OUT,) float32."""
    ours = _ours("filters", x, tuple(x.shape), g.shape[1])
    return (our_filters if ours else torch_filters)(x, g, which)


@pooled_filters.register_fake
def _(x: Tensor, g: Tensor, which: Tensor) -> Tensor:
    return torch.empty(g.shape[1] * (9 * x.shape[1] + 1), dtype=torch.float32, device=x.device)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])


def _backward(ctx: Any, g: Tensor, _: None) -> tuple[Tensor | None, Tensor, Tensor]:
    x, weight, which = ctx.saved_tensors
    g = as_last(g)  # here, where it is part of the kernel that makes it
    images = pooled_images(g, which, weight) if ctx.needs_input_grad[0] else None
    found = pooled_filters(x, g, which)
    outer, inner = weight.shape[:2]
    filters = found[: outer * 9 * inner].view(outer, SIDE, SIDE, inner).permute(0, 3, 1, 2)
    return images, filters, found[outer * 9 * inner :]


pooled.register_autograd(_backward, setup_context=_keep_inputs)
