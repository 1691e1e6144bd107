"""2 x 2 max-pooling of images whose channels come last, for pools that are not fused with a convolution.

torch.compile makes the gradient of the pool part of BatchNorm's. In the 94 % network that is one kernel of 500 us and one of
307 us in a step of 5.9 ms (H100, H200), several times what it takes to read the squares and to write the pixels once. Here the
forward pass keeps the `argmax` of each 2 x 2 square: which of its four pixels (0, 1; 2, 3) is the largest. The gradient goes
there, and zeros go to the others. Nothing is added up, so the results have torch's bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from cifar.kernels.triton.launch import Shape, empty_channels_last, to_channels_last
from cifar.kernels.triton.verify import KernelCase, RandomInputs, Verifier

CHANNELS_PER_LOAD = 8  # half-precision channels that a thread reads at once: 16 bytes
MIN_POOL_CHANNELS = 64  # channels from which on it is known to be worth a kernel of its own (LOG.md)


class PoolTile(NamedTuple):
    """What a program does. Powers of two; with more than 8 values a thread, `argmax` goes through shared memory."""

    values: int  # squares times channels
    channels: int  # at most
    warps: int


# 32 and 31 registers; 128 channels divide 384, 256 do not
FORWARD_TILE, BACKWARD_TILE = PoolTile(1024, 128, 4), PoolTile(1024, 128, 4)


# -- the kernels -------------------------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def _locate_squares(  # type: ignore[no-untyped-def]
    num_squares, ROWS: tl.constexpr, ACROSS: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    """The squares of a program: index, image, row and column; its channels; and a mask of what is inside of the image.

    An image has ROWS x ACROSS squares. Programs that share the channels of the same squares follow each other, because those
    channels are neighbours in memory.
    """
    PARTS: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    q = tl.program_id(0) // PARTS * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(0) % PARTS * COLUMNS + tl.arange(0, COLUMNS)
    mask = (q < num_squares)[:, None] & (c < CHANNELS)[None, :]
    return q, q // (ROWS * ACROSS), q // ACROSS % ROWS, q % ACROSS, c[None, :], mask


@triton.jit  # type: ignore[untyped-decorator]
def _max_with_index(value, index, other, other_index: tl.constexpr):  # type: ignore[no-untyped-def]
    """The larger of two values and its index. As in torch: the first of two equal values, and NaN where there is one."""
    new = other.to(tl.float32)
    is_larger = (new > value.to(tl.float32)) | (new != new)
    return tl.where(is_larger, other, value), tl.where(is_larger, other_index, index)


@triton.jit  # type: ignore[untyped-decorator]
def _max_pool_kernel(  # type: ignore[no-untyped-def]
    x, y, argmax, num_squares,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[q, c] and argmax[q, c] of every square q; x (pixels, CHANNELS), channels last."""
    q, image, row, column, c, mask = _locate_squares(num_squares, HEIGHT // 2, WIDTH // 2, CHANNELS, COLUMNS, BLOCK)
    sources = x + ((image * HEIGHT + 2 * row) * WIDTH + 2 * column)[:, None] * CHANNELS + c
    first = tl.load(sources, mask=mask)
    second = tl.load(sources + CHANNELS, mask=mask)
    third = tl.load(sources + WIDTH * CHANNELS, mask=mask)
    fourth = tl.load(sources + (WIDTH + 1) * CHANNELS, mask=mask)
    value, index = _max_with_index(first, 0, second, 1)
    value, index = _max_with_index(value, index, third, 2)
    value, index = _max_with_index(value, index, fourth, 3)
    targets = q[:, None] * CHANNELS + c
    tl.store(y + targets, value, mask=mask)
    tl.store(argmax + targets, index.to(tl.int8), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _max_unpool_kernel(  # type: ignore[no-untyped-def]
    g, argmax, y, num_squares,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[p, c] of every pixel p: the gradient g[q, c] of its square q at the argmax, zero elsewhere.

    Here an odd last row or column is in squares of its own, which have no gradient.
    """
    _, image, row, column, c, mask = _locate_squares(num_squares, (HEIGHT + 1) // 2, (WIDTH + 1) // 2, CHANNELS, COLUMNS, BLOCK)
    whole = mask & ((row < HEIGHT // 2) & (column < WIDTH // 2))[:, None]
    sources = ((image * (HEIGHT // 2) + row) * (WIDTH // 2) + column)[:, None] * CHANNELS + c
    gradient = tl.load(g + sources, mask=whole, other=0.0)
    winner = tl.load(argmax + sources, mask=whole, other=0)
    targets = y + ((image * HEIGHT + 2 * row) * WIDTH + 2 * column)[:, None] * CHANNELS + c
    right, below = (2 * column + 1 < WIDTH)[:, None], (2 * row + 1 < HEIGHT)[:, None]
    tl.store(targets, tl.where(winner == 0, gradient, 0.0), mask=mask)
    tl.store(targets + CHANNELS, tl.where(winner == 1, gradient, 0.0), mask=mask & right)
    tl.store(targets + WIDTH * CHANNELS, tl.where(winner == 2, gradient, 0.0), mask=mask & below)
    tl.store(targets + (WIDTH + 1) * CHANNELS, tl.where(winner == 3, gradient, 0.0), mask=mask & right & below)


def _launch_pool(kernel: Any, tile: PoolTile, tensors: tuple[Tensor, ...], num_squares: int, shape: Shape) -> None:
    """Run a kernel on `tensors`, for so many squares of images (N, C, H, W)."""
    _, channels, height, width = shape
    columns = min(tile.channels, triton.next_power_of_2(channels))
    block = tile.values // columns
    num_programs = triton.cdiv(num_squares, block) * triton.cdiv(channels, columns)
    with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
        kernel[(num_programs,)](*tensors, num_squares, height, width, channels, columns, block, num_warps=tile.warps)


# -- each operator by Triton and by torch ------------------------------------------------------------------------------


def max_pool_2x2_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    """`max_pool_2x2` by our kernel."""
    x = to_channels_last(x)
    y, argmax = _empty_pooled(x)
    _launch_pool(_max_pool_kernel, FORWARD_TILE, (x, y, argmax), len(x) * y.shape[2] * y.shape[3], x.shape)
    return y, argmax


def max_pool_2x2_input_grad_triton(g: Tensor, argmax: Tensor, height: int, width: int) -> Tensor:
    """`max_pool_2x2_input_grad` by our kernel."""
    g, argmax = to_channels_last(g), to_channels_last(argmax)
    y = empty_channels_last(g, (*g.shape[:2], height, width))
    num_squares = len(g) * ((height + 1) // 2) * ((width + 1) // 2)
    _launch_pool(_max_unpool_kernel, BACKWARD_TILE, (g, argmax, y), num_squares, y.shape)
    return y


def max_pool_2x2_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """`max_pool_2x2` by torch."""
    y, argmax = _empty_pooled(x)  # so that strides are right where a square is all of an image
    values, places = max_pool_with_argmax(x)
    return y.copy_(values), argmax.copy_(places)


def max_pool_2x2_input_grad_reference(g: Tensor, argmax: Tensor, height: int, width: int) -> Tensor:
    """`max_pool_2x2_input_grad` by torch."""
    return to_channels_last(F.pad(max_unpool_2x2(g, argmax), (0, width % 2, 0, height % 2)))


def max_pool_with_argmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """torch's 2 x 2 max-pooling: values (N, C, H // 2, W // 2), and which of the four pixels each of them is, int64."""
    values, indices = F.max_pool2d(x, 2, return_indices=True)
    width = x.shape[3]
    return values, indices // width % 2 * 2 + indices % width % 2


def max_unpool_2x2(g: Tensor, argmax: Tensor) -> Tensor:
    """Gradients of squares (N, C, H, W) -> of their pixels (N, C, 2 H, 2 W): at the argmax (0 to 3), zero elsewhere."""
    full = g.new_zeros((*g.shape[:2], 2 * g.shape[2], 2 * g.shape[3])).contiguous(memory_format=torch.channels_last)
    for index in range(4):
        full[:, :, index // 2 :: 2, index % 2 :: 2] = torch.where(argmax == index, g, 0)
    return full


def _empty_pooled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Room for values and argmax."""
    y = empty_channels_last(x, (x.shape[0], x.shape[1], x.shape[2] // 2, x.shape[3] // 2))
    return y, torch.empty_like(y, dtype=torch.int8)


# -- which of the two --------------------------------------------------------------------------------------------------


def supports_channels(channels: int) -> bool:
    """Whether our kernels are meant for so many channels."""
    return channels % CHANNELS_PER_LOAD == 0


def _supports_case(case: KernelCase) -> bool:
    return supports_channels(case.shape[1])


def _matches_reference(case: KernelCase, inputs: RandomInputs) -> bool:
    """To the bit. Some of the rounded values are equal, so the choice among equal ones is tried too."""
    height, width = case.shape[2:]
    x = inputs.draw_images(*case.shape)
    if case.kernel == "forward":
        return all(map(torch.equal, max_pool_2x2_triton(x), max_pool_2x2_reference(x)))
    g, argmax = max_pool_2x2_reference(x)
    expected = max_pool_2x2_input_grad_reference(g, argmax, height, width)
    return torch.equal(max_pool_2x2_input_grad_triton(g, argmax, height, width), expected)


verifier = Verifier(_supports_case, _matches_reference)


# -- operators ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("cifar::halve", mutates_args=())
def max_pool_2x2(x: Tensor) -> tuple[Tensor, Tensor]:
    """2 x 2 max-pooling, stride 2. x (N, C, H, W) -> (N, C, H // 2, W // 2), channels last, without an odd last row or column.

    And the argmax of the same shape, int8: which of the four pixels of its square (0, 1; 2, 3) each value is, the first of
    equal ones.
    """
    return (max_pool_2x2_triton if verifier.can_use("forward", x, x.shape[1]) else max_pool_2x2_reference)(x)


@max_pool_2x2.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_pooled(x)


@torch.library.custom_op("cifar::halve_images", mutates_args=())
def max_pool_2x2_input_grad(g: Tensor, argmax: Tensor, height: int, width: int) -> Tensor:
    """The gradient of x (N, C, height, width), channels last, from that of the values (N, C, height // 2, width // 2)."""
    use_triton = verifier.can_use("input_grad", g, g.shape[1], shape=(*g.shape[:2], height, width))
    compute = max_pool_2x2_input_grad_triton if use_triton else max_pool_2x2_input_grad_reference
    return compute(g, argmax, height, width)


@max_pool_2x2_input_grad.register_fake
def _(g: Tensor, argmax: Tensor, height: int, width: int) -> Tensor:
    return empty_channels_last(g, (*g.shape[:2], height, width))


def _save_for_backward(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.size = inputs[0].shape[2:]
    ctx.save_for_backward(output[1])


def _max_pool_backward(ctx: Any, g: Tensor, _: None) -> Tensor:
    (argmax,) = ctx.saved_tensors
    # to_channels_last here, where it becomes part of the kernel that makes g
    images: Tensor = max_pool_2x2_input_grad(to_channels_last(g), argmax, *ctx.size)
    return images


max_pool_2x2.register_autograd(_max_pool_backward, setup_context=_save_for_backward)
