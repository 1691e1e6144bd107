"""2 x 2 max-pooling of images whose channels come last, for pools that no convolution of ours does along the way.

torch.compile makes the pool's gradient part of BatchNorm's. In the 94 % network that is one kernel of 500 us and one of 307 us
in a step of 5.9 ms (H100, H200), several times what it takes to read the squares and to write the pixels once. Here the forward
pass keeps which of its four pixels each square's largest value is; the gradient goes there, and zeros go to the others.
Nothing is added up, so the results have torch's bits. Proved on the GPU before use and replaced by torch's where it is wrong,
as in plain.py.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from cifar.kernels.triton.conv3x3 import MOST_PROVED, Shape, as_last, few, works
from cifar.kernels.triton.conv_relu_pool import spread

TOGETHER = 8  # half-precision channels that a thread reads at once: 16 bytes
LEAST = 64  # channels from which on it is known to be worth a kernel of its own (LOG.md)


class Share(NamedTuple):
    """What a program does. Powers of two; with more than 8 values a thread, `which` goes through shared memory."""

    values: int  # squares times channels
    channels: int  # at most
    warps: int


FORWARD, BACKWARD = Share(1024, 128, 4), Share(1024, 128, 4)  # 32 and 31 registers; 128 channels divide 384, 256 do not


# -- our kernels, and the same by torch --------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def _where(  # type: ignore[no-untyped-def]
    squares, ROWS: tl.constexpr, ACROSS: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    """A program's squares, ROWS x ACROSS an image: number, image, row and column; its channels; and which of these there are.

    Programs that share the channels of the same squares follow each other, as those lie beside each other in memory.
    """
    PARTS: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    q = tl.program_id(0) // PARTS * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(0) % PARTS * COLUMNS + tl.arange(0, COLUMNS)
    there = (q < squares)[:, None] & (c < CHANNELS)[None, :]
    return q, q // (ROWS * ACROSS), q // ACROSS % ROWS, q % ACROSS, c[None, :], there


@triton.jit  # type: ignore[untyped-decorator]
def _larger(value, place, other, at: tl.constexpr):  # type: ignore[no-untyped-def]
    """The larger of two and its place; the first of two that are equal, and NaN where there is one, as torch has it."""
    new = other.to(tl.float32)
    take = (new > value.to(tl.float32)) | (new != new)
    return tl.where(take, other, value), tl.where(take, at, place)


@triton.jit  # type: ignore[untyped-decorator]
def _halve(  # type: ignore[no-untyped-def]
    x, y, which, squares,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[q, c] and which[q, c] of every square q; x (pixels, CHANNELS), channels last."""
    q, image, row, column, c, there = _where(squares, HEIGHT // 2, WIDTH // 2, CHANNELS, COLUMNS, BLOCK)
    at = x + ((image * HEIGHT + 2 * row) * WIDTH + 2 * column)[:, None] * CHANNELS + c
    first = tl.load(at, mask=there)
    second = tl.load(at + CHANNELS, mask=there)
    third = tl.load(at + WIDTH * CHANNELS, mask=there)
    fourth = tl.load(at + (WIDTH + 1) * CHANNELS, mask=there)
    value, place = _larger(first, 0, second, 1)
    value, place = _larger(value, place, third, 2)
    value, place = _larger(value, place, fourth, 3)
    to = q[:, None] * CHANNELS + c
    tl.store(y + to, value, mask=there)
    tl.store(which + to, place.to(tl.int8), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _spread(  # type: ignore[no-untyped-def]
    g, which, y, squares,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[p, c] of every pixel p: the gradient g[q, c] of its square q at one of the four.

    An odd last row and column are in squares of their own here, that have no gradient.
    """
    _, image, row, column, c, there = _where(squares, (HEIGHT + 1) // 2, (WIDTH + 1) // 2, CHANNELS, COLUMNS, BLOCK)
    whole = there & ((row < HEIGHT // 2) & (column < WIDTH // 2))[:, None]
    at = ((image * (HEIGHT // 2) + row) * (WIDTH // 2) + column)[:, None] * CHANNELS + c
    gradient = tl.load(g + at, mask=whole, other=0.0)
    chosen = tl.load(which + at, mask=whole, other=0)
    to = y + ((image * HEIGHT + 2 * row) * WIDTH + 2 * column)[:, None] * CHANNELS + c
    right, below = (2 * column + 1 < WIDTH)[:, None], (2 * row + 1 < HEIGHT)[:, None]
    tl.store(to, tl.where(chosen == 0, gradient, 0.0), mask=there)
    tl.store(to + CHANNELS, tl.where(chosen == 1, gradient, 0.0), mask=there & right)
    tl.store(to + WIDTH * CHANNELS, tl.where(chosen == 2, gradient, 0.0), mask=there & below)
    tl.store(to + (WIDTH + 1) * CHANNELS, tl.where(chosen == 3, gradient, 0.0), mask=there & right & below)


def _launch(kernel: Any, share: Share, tensors: tuple[Tensor, ...], squares: int, shape: Shape) -> None:
    """Run a kernel on `tensors`, for so many squares of images (N, C, H, W)."""
    _, channels, height, width = shape
    columns = min(share.channels, triton.next_power_of_2(channels))
    block = share.values // columns
    programs = triton.cdiv(squares, block) * triton.cdiv(channels, columns)
    with torch.cuda.device_of(tensors[0]):  # type: ignore[no-untyped-call]  # Triton launches where the process is
        kernel[(programs,)](*tensors, squares, height, width, channels, columns, block, num_warps=share.warps)


def our_halve(x: Tensor) -> tuple[Tensor, Tensor]:
    """`halve` by our kernel."""
    x = as_last(x)
    y, which = _empty(x)
    _launch(_halve, FORWARD, (x, y, which), len(x) * y.shape[2] * y.shape[3], x.shape)
    return y, which


def our_images(g: Tensor, which: Tensor, height: int, width: int) -> Tensor:
    """`halve_images` by our kernel."""
    g, which = as_last(g), as_last(which)
    y = _full(g, height, width)
    _launch(_spread, BACKWARD, (g, which, y), len(g) * ((height + 1) // 2) * ((width + 1) // 2), y.shape)
    return y


def torch_halve(x: Tensor) -> tuple[Tensor, Tensor]:
    """`halve` by torch."""
    y, which = _empty(x)  # so that strides are right where a square is all of an image
    values, at = F.max_pool2d(x, 2, return_indices=True)
    width = x.shape[3]
    return y.copy_(values), which.copy_(at // width % 2 * 2 + at % width % 2)


def torch_images(g: Tensor, which: Tensor, height: int, width: int) -> Tensor:
    """`halve_images` by torch."""
    return as_last(F.pad(spread(g, which), (0, width % 2, 0, height % 2)))


def _empty(x: Tensor) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[1], x.shape[2] // 2, x.shape[3] // 2)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, torch.empty_like(y, dtype=torch.int8)


def _full(g: Tensor, height: int, width: int) -> Tensor:
    shape = (g.shape[0], g.shape[1], height, width)
    return torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=torch.channels_last)


# -- operators ---------------------------------------------------------------------------------------------------------


def suits(channels: int) -> bool:
    """Whether our kernels are for so many channels."""
    return channels % TOGETHER == 0


def _ours(kind: str, x: Tensor, shape: Shape) -> bool:
    """Whether our kernel is taken for images (N, C, H, W); it counts their values in 32 bits."""
    proved = (min(shape[0], MOST_PROVED), *shape[1:])
    return suits(shape[1]) and few(shape, shape[1]) and _right(kind, proved, x.dtype, x.device)


@functools.cache
def _right(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether our kernel gives torch's answer on this device, to the bit. Rounded, some values are equal: that is tried too."""
    seeded = torch.Generator(device).manual_seed(0)

    def agree() -> bool:
        x = as_last(torch.randn(shape, generator=seeded, device=device).to(dtype))
        if kind == "halve":
            return all(map(torch.equal, our_halve(x), torch_halve(x)))
        g, which = torch_halve(x)
        return torch.equal(our_images(g, which, *shape[2:]), torch_images(g, which, *shape[2:]))

    return works(agree)


@torch.library.custom_op("cifar::halve", mutates_args=())
def halve(x: Tensor) -> tuple[Tensor, Tensor]:
    """2 x 2 max-pooling, stride 2. x (N, C, H, W) -> (N, C, H // 2, W // 2), channels last, without an odd last row or column.

    And of the same shape, int8: which of its square's four pixels (0, 1; 2, 3) each value is, the first of equal ones.
    """
    return (our_halve if _ours("halve", x, x.shape) else torch_halve)(x)


@halve.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(x)


@torch.library.custom_op("cifar::halve_images", mutates_args=())
def halve_images(g: Tensor, which: Tensor, height: int, width: int) -> Tensor:
    """The gradient of x (N, C, height, width), channels last, from that of `halve`'s values (N, C, height // 2, width // 2)."""
    ours = _ours("images", g, (len(g), g.shape[1], height, width))
    return (our_images if ours else torch_images)(g, which, height, width)


@halve_images.register_fake
def _(g: Tensor, which: Tensor, height: int, width: int) -> Tensor:
    return _full(g, height, width)


def _keep_places(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.size = inputs[0].shape[2:]
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, g: Tensor, _: None) -> Tensor:
    (which,) = ctx.saved_tensors
    images: Tensor = halve_images(as_last(g), which, *ctx.size)  # as_last is part of the kernel that makes g
    return images


halve.register_autograd(_backward, setup_context=_keep_places)
