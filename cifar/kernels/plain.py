"""3 x 3 convolutions with few channels, in Triton, for compiled steps on a GPU.

cuDNN has no quick kernels for 3, 16 or 32 channels: in a step of ResNet-20 at batch 512 they took half of the time, several
times what it takes to read and write the images once (LOG.md). Here the three taps of a filter row, which lie beside each other
in memory when channels come last, are one row of a matrix product, and four lines of images are worked on together, so that a
line is read once for the three filter rows that need it. bf16 in, float32 sums; weights and their gradients stay float32, so
nothing is cast in a pass of its own. No atomics: the same step gives the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

SIDE, LINES = 3, 4  # of a filter; of the images that are worked on together
MOST_IN, MOST_OUT = 32, 64  # channels
MOST_PROVED = 2048  # images that a kernel is tried with
TOLERATED = 1e-2  # relative error of a sum of products of bf16 numbers that is rounded to bf16


@triton.jit  # type: ignore[untyped-decorator]
def line_of(x, inside, row, HEIGHT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The taps at x; zeros where a line is outside of the image."""
    return tl.load(x, mask=inside & ((row >= 0) & (row < HEIGHT))[:, None], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def places_of(  # type: ignore[no-untyped-def]
    block, k, places, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, BLOCK: tl.constexpr
):
    """A block's places (a column of four lines each): their numbers, first pixels, rows, and which taps are in the image."""
    place = block * BLOCK + tl.arange(0, BLOCK)
    p = place // WIDTH * (4 * WIDTH) + place % WIDTH
    row = place // WIDTH * 4 % HEIGHT
    there = (place % WIDTH)[:, None] + (k // IN)[None, :] - 1
    inside = (k < 3 * IN)[None, :] & (there >= 0) & (there < WIDTH) & (place < places)[:, None]
    return place, p, row, inside


@triton.jit  # type: ignore[untyped-decorator]
def _convolve(  # type: ignore[no-untyped-def]
    x, weight, y, places, programs, s_out, s_in, s_row, s_column,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    TAPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[p, o] = sum of x[p + offset, i] * weight[o, i, row, column]; x (pixels, IN) and y (pixels, OUT), channels last.

    TAPS and COLUMNS: 3 * IN and OUT, rounded up to powers of two of at least 16.
    """
    k, o = tl.arange(0, TAPS), tl.arange(0, COLUMNS)
    column, i = k // IN, k % IN
    where = weight + column[:, None] * s_column + i[:, None] * s_in + o[None, :] * s_out
    known = (k < 3 * IN)[:, None] & (o < OUT)[None, :]
    above = tl.load(where, mask=known, other=0.0).to(x.dtype.element_ty)
    level = tl.load(where + s_row, mask=known, other=0.0).to(x.dtype.element_ty)
    below = tl.load(where + 2 * s_row, mask=known, other=0.0).to(x.dtype.element_ty)
    for block in range(tl.program_id(0), (places + BLOCK - 1) // BLOCK, programs):
        place, p, row, inside = places_of(block, k, places, HEIGHT, WIDTH, IN, BLOCK)
        taps = x + p[:, None] * IN + (k - IN)[None, :]
        to = y + p[:, None] * OUT + o[None, :]
        out = (place < places)[:, None] & (o < OUT)[None, :]
        line0 = line_of(taps - WIDTH * IN, inside, row - 1, HEIGHT)
        line1 = tl.load(taps, mask=inside, other=0.0)
        line2 = tl.load(taps + WIDTH * IN, mask=inside, other=0.0)
        line3 = tl.load(taps + 2 * WIDTH * IN, mask=inside, other=0.0)
        line4 = tl.load(taps + 3 * WIDTH * IN, mask=inside, other=0.0)
        line5 = line_of(taps + 4 * WIDTH * IN, inside, row + 4, HEIGHT)
        total = tl.dot(line2, below, tl.dot(line1, level, tl.dot(line0, above)))
        tl.store(to, total.to(y.dtype.element_ty), mask=out)
        total = tl.dot(line3, below, tl.dot(line2, level, tl.dot(line1, above)))
        tl.store(to + WIDTH * OUT, total.to(y.dtype.element_ty), mask=out)
        total = tl.dot(line4, below, tl.dot(line3, level, tl.dot(line2, above)))
        tl.store(to + 2 * WIDTH * OUT, total.to(y.dtype.element_ty), mask=out)
        total = tl.dot(line5, below, tl.dot(line4, level, tl.dot(line3, above)))
        tl.store(to + 3 * WIDTH * OUT, total.to(y.dtype.element_ty), mask=out)


@triton.jit  # type: ignore[untyped-decorator]
def _correlate(  # type: ignore[no-untyped-def]
    x, g, parts, places, programs,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    TAPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts[program, o, row, column * IN + i] = sum of x[p + offset, i] * g[p, o] over the program's pixels."""
    k, o = tl.arange(0, TAPS), tl.arange(0, COLUMNS)
    above = tl.full((TAPS, COLUMNS), 0.0, tl.float32)
    level = tl.full((TAPS, COLUMNS), 0.0, tl.float32)
    below = tl.full((TAPS, COLUMNS), 0.0, tl.float32)
    for block in range(tl.program_id(0), (places + BLOCK - 1) // BLOCK, programs):
        place, p, row, inside = places_of(block, k, places, HEIGHT, WIDTH, IN, BLOCK)
        taps = x + p[:, None] * IN + (k - IN)[None, :]
        at = g + p[:, None] * OUT + o[None, :]
        out = (place < places)[:, None] & (o < OUT)[None, :]
        g0 = tl.load(at, mask=out, other=0.0)
        g1 = tl.load(at + WIDTH * OUT, mask=out, other=0.0)
        g2 = tl.load(at + 2 * WIDTH * OUT, mask=out, other=0.0)
        g3 = tl.load(at + 3 * WIDTH * OUT, mask=out, other=0.0)
        line = tl.trans(line_of(taps - WIDTH * IN, inside, row - 1, HEIGHT))
        above = tl.dot(line, g0, above)
        line = tl.trans(tl.load(taps, mask=inside, other=0.0))
        above = tl.dot(line, g1, above)
        level = tl.dot(line, g0, level)
        line = tl.trans(tl.load(taps + WIDTH * IN, mask=inside, other=0.0))
        above = tl.dot(line, g2, above)
        level = tl.dot(line, g1, level)
        below = tl.dot(line, g0, below)
        line = tl.trans(tl.load(taps + 2 * WIDTH * IN, mask=inside, other=0.0))
        above = tl.dot(line, g3, above)
        level = tl.dot(line, g2, level)
        below = tl.dot(line, g1, below)
        line = tl.trans(tl.load(taps + 3 * WIDTH * IN, mask=inside, other=0.0))
        level = tl.dot(line, g3, level)
        below = tl.dot(line, g2, below)
        line = tl.trans(line_of(taps + 4 * WIDTH * IN, inside, row + 4, HEIGHT))
        below = tl.dot(line, g3, below)
    where = parts + tl.program_id(0) * (9 * IN * OUT) + k[:, None] + o[None, :] * (9 * IN)
    known = (k < 3 * IN)[:, None] & (o < OUT)[None, :]
    tl.store(where, above, mask=known)
    tl.store(where + 3 * IN, level, mask=known)
    tl.store(where + 6 * IN, below, mask=known)


@triton.jit
def _plus(one, other):  # type: ignore[no-untyped-def]
    return one + other


@triton.jit  # type: ignore[untyped-decorator]
def _sum(parts, total, programs, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """total[c] = sum of parts[program, c] over the programs."""
    c, row = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    found = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for first in range(0, programs, ROWS):
        inside = (first + row < programs)[:, None] & (c < SIZE)[None, :]
        found += tl.load(parts + (first + row)[:, None] * SIZE + c[None, :], mask=inside, other=0.0)
    tl.store(total + c, tl.reduce(found, 0, _plus), mask=c < SIZE)


class How(NamedTuple):
    """A kernel's shape: places a block, warps, pipeline stages, programs a multiprocessor. By measurement (LOG.md)."""

    block: int
    warps: int
    stages: int
    each: float


CONVOLVE = {16: How(128, 4, 1, 8), 32: How(64, 4, 2, 4), 64: How(64, 4, 1, 4), 128: How(64, 4, 1, 2)}  # by TAPS
SUMMED = 64, 32  # rows that are added at once, and columns a program
CORRELATE = {16: How(128, 4, 2, 2), 32: How(64, 4, 2, 2), 64: How(64, 4, 3, 1), 128: How(32, 4, 3, 1)}


def rounded(count: int) -> int:
    """As many rows or columns as a matrix product takes."""
    return max(16, 1 << (count - 1).bit_length())


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 2


Shape = Sequence[int]  # (N, C, H, W)


def programs_of(how: How, shape: Shape, device: torch.device) -> int:
    """How many programs share the places of images."""
    places = shape[0] * shape[2] * shape[3] // LINES
    return max(1, int(min(_processors(device) * how.each, triton.cdiv(places, how.block))))


def launch(
    kernel: Any, how: How, shape: Shape, outer: int, tensors: tuple[Tensor, ...], strides: tuple[int, ...] = (), taps: int = 0
) -> None:
    """Run a kernel on `tensors`, the results last. `shape`: of the images at full size, with the channels that are summed."""
    count, inner, height, width = shape
    programs = programs_of(how, shape, tensors[0].device)
    with torch.cuda.device_of(tensors[0]):  # type: ignore[no-untyped-call]  # Triton launches where the process is
        kernel[(programs,)](
            *tensors, count * height * width // LINES, programs, *strides,
            height, width, inner, outer, taps or rounded(SIDE * inner), rounded(outer),
            how.block, num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip


def as_last(x: Tensor) -> Tensor:
    """x with its channels last in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def turned(weight: Tensor, back: bool) -> tuple[Tensor, tuple[int, ...]]:
    """Where filters begin, and their strides (out, in, row, column); `back`: turned by half a circle, channels exchanged."""
    s_out, s_in, s_row, s_column = weight.stride()
    if not back:
        return weight, (s_out, s_in, s_row, s_column)
    last = weight.as_strided((1,), (1,), weight.storage_offset() + 2 * s_row + 2 * s_column)
    return last, (s_in, s_out, -s_row, -s_column)


def our_convolve(x: Tensor, weight: Tensor, back: bool) -> Tensor:
    """`convolve` by our kernel."""
    x, outer = as_last(x), weight.shape[1 if back else 0]
    y = torch.empty((x.shape[0], outer, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    filters, strides = turned(weight, back)
    launch(_convolve, CONVOLVE[rounded(SIDE * x.shape[1])], x.shape, outer, (x, filters, y), strides)
    return y


def our_correlate(x: Tensor, g: Tensor) -> Tensor:
    """`correlate` by our kernel: each program's sum, and the sum of these."""
    x, g = as_last(x), as_last(g)
    inner, outer = x.shape[1], g.shape[1]
    how = CORRELATE[rounded(SIDE * inner)]
    parts = torch.empty((programs_of(how, x.shape, x.device), outer * 9 * inner), dtype=torch.float32, device=x.device)
    launch(_correlate, how, x.shape, outer, (x, g, parts))
    return added(parts).view(outer, SIDE, SIDE, inner).permute(0, 3, 1, 2)


def added(parts: Tensor) -> Tensor:
    """(programs, size) float32 -> (size,): always in the same order. torch's own sum takes three times as long (LOG.md)."""
    programs, size = parts.shape
    total = parts.new_empty(size)
    with torch.cuda.device_of(parts):  # type: ignore[no-untyped-call]
        _sum[(triton.cdiv(size, SUMMED[1]),)](parts, total, programs, size, *SUMMED, num_warps=4)
    return total


def torch_convolve(x: Tensor, weight: Tensor, back: bool) -> Tensor:
    """`convolve` by torch."""
    weight = weight.to(x.dtype)
    return as_last(F.conv_transpose2d(x, weight, padding=1) if back else F.conv2d(x, weight, padding=1))


def torch_correlate(x: Tensor, g: Tensor) -> Tensor:
    """`correlate` by torch."""
    weight = torch.empty((g.shape[1], x.shape[1], SIDE, SIDE), dtype=x.dtype, device=x.device)
    ones, none, wanted = [1, 1], [0, 0], [False, True, False]
    found: Tensor = torch.ops.aten.convolution_backward(g, x, weight, None, ones, ones, ones, False, none, 1, wanted)[1]
    return found.to(torch.float32, memory_format=torch.channels_last)


def meant(inner: int, outer: int, height: int) -> bool:
    """Whether our kernels are for such images."""
    return height % LINES == 0 and inner <= MOST_IN and outer <= MOST_OUT


def _ours(kind: str, x: Tensor, outer: int, strides: tuple[int, ...] = ()) -> bool:
    """Whether our kernel is taken for these images; it counts their values in 32 bits."""
    return (
        few(x.shape, outer)
        and meant(x.shape[1], outer, x.shape[2])
        and _right(kind, (min(len(x), MOST_PROVED), *x.shape[1:]), outer, strides, x.dtype, x.device)
    )


def few(shape: Shape, outer: int) -> bool:
    """Whether 32 bits count the values of the images, and of the results."""
    count, inner, height, width = shape
    return count * height * width * max(inner, outer) < 2**31


@functools.cache
def _right(
    kind: str, shape: tuple[int, ...], outer: int, strides: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether our kernel gives torch's answer on this device, with images and filters that lie as they will."""
    seeded = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=seeded, device=device)

    x, back = as_last(draw(*shape).to(dtype)), kind == "back"

    def agree() -> bool:
        if kind == "correlate":
            g = as_last(draw(shape[0], outer, *shape[2:]).to(dtype))
            return near(our_correlate(x, g), torch_correlate(x.float(), g.float()))
        filters = (shape[1], outer) if back else (outer, shape[1])
        weight = torch.empty_strided((*filters, SIDE, SIDE), strides, device=device)
        weight.copy_(draw(*weight.shape).to(dtype))
        return near(our_convolve(x, weight, back), torch_convolve(x.float(), weight, back))

    return works(agree)


def near(ours: Tensor, wanted: Tensor) -> bool:
    """Whether two results differ by rounding only."""
    return bool((ours.float() - wanted).norm() < TOLERATED * wanted.norm())


@torch.no_grad()
def works(agree: Callable[[], bool]) -> bool:
    """Whether kernels agree with torch here; what Triton cannot do, torch can."""
    try:
        return agree()
    except (triton.runtime.errors.TritonError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
            raise
        return False


@torch.library.custom_op("cifar::convolve_3x3", mutates_args=())
def convolve(x: Tensor, weight: Tensor, back: bool) -> Tensor:
    """3 x 3, stride 1, zero padding of 1. x (N, IN, H, W), weight (OUT, IN, 3, 3) float32 -> (N, OUT, H, W), channels last.

    `back`: the gradient of the images from that of the result: x (N, OUT, H, W) -> (N, IN, H, W).
    """
    ours = _ours("back" if back else "convolve", x, weight.shape[1 if back else 0], weight.stride())
    return (our_convolve if ours else torch_convolve)(x, weight, back)


@convolve.register_fake
def _(x: Tensor, weight: Tensor, back: bool) -> Tensor:
    shape = (x.shape[0], weight.shape[1 if back else 0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op("cifar::correlate_3x3", mutates_args=())
def correlate(x: Tensor, g: Tensor) -> Tensor:
    """The gradient of the filters: x (N, IN, H, W), g (N, OUT, H, W) -> (OUT, IN, 3, 3) float32, channels last."""
    return (our_correlate if _ours("correlate", x, g.shape[1]) else torch_correlate)(x, g)


@correlate.register_fake
def _(x: Tensor, g: Tensor) -> Tensor:
    shape = (g.shape[1], x.shape[1], SIDE, SIDE)
    return torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=torch.channels_last)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.back = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    if ctx.back:
        raise NotImplementedError("these convolutions have no second derivative")
    x, weight = ctx.saved_tensors
    images = convolve(g, weight, True) if ctx.needs_input_grad[0] else None
    return images, correlate(x, g) if ctx.needs_input_grad[1] else None, None


convolve.register_autograd(_backward, setup_context=_keep)
