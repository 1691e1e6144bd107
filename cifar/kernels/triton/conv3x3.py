"""3 x 3 convolutions with few channels, in Triton, for compiled steps on a GPU.

cuDNN has no quick kernels for 3, 16 or 32 channels: in a step of ResNet-20 at batch 512 they took half of the time, several
times what it takes to read and write the images once (LOG.md). bf16 in, float32 sums; weights and their gradients stay float32,
so nothing is cast in a pass of its own. No atomics: the same step gives the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from cifar.kernels.triton.conv3x3_kernels import add_parts, convolve_lines, correlate_lines
from cifar.kernels.triton.conv3x3_tap_kernels import convolve_taps, correlate_taps

SIDE, LINES = 3, 4  # of a filter; of the images that are worked on together
MOST_IN, MOST_OUT = 32, 64  # channels
SMALL = 64  # pixels of an image up to which as many channels may go in as come out
MOST_PROVED = 2048  # images that a kernel is tried with
TOLERATED = 1e-2  # relative error of a sum of products of bf16 numbers that is rounded to bf16


class How(NamedTuple):
    """A kernel's shape: places a block, warps, pipeline stages, programs a multiprocessor. By measurement (LOG.md)."""

    block: int
    warps: int
    stages: int
    each: float


CONVOLVE = {16: How(128, 4, 1, 8), 32: How(64, 4, 2, 4), 64: How(64, 4, 1, 4), 128: How(64, 4, 1, 2)}  # by TAPS
CONVOLVE_FEW = {(16, 16): How(128, 4, 1, 4), (64, 16): How(64, 2, 2, 4), (128, 32): How(128, 8, 1, 1)}  # by TAPS and COLUMNS
SUMMED, SUMMED_MANY = (128, 8), (64, 32)  # rows that are added at once, and columns a program; of MANY columns
MANY = 16_384
CORRELATE = {16: How(128, 4, 2, 2), 32: How(64, 4, 2, 2), 64: How(64, 4, 3, 1), 128: How(32, 4, 3, 1)}
CORRELATE_FEW = {(128, 32): How(64, 4, 2, 1)}
CONVOLVE_TAPS, CORRELATE_TAPS = How(256, 8, 3, 1), How(64, 4, 3, 0.34)


def rounded(count: int) -> int:
    """As many rows or columns as a matrix product takes."""
    return max(16, 1 << (count - 1).bit_length())


@functools.cache
def processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 2


Shape = Sequence[int]  # (N, C, H, W)


def programs_of(how: How, places: int, processors: int) -> int:
    """How many programs share so many places."""
    return max(1, min(int(processors * how.each), -(-places // how.block)))


def launch(
    kernel: Any,
    how: How,
    shape: Shape,
    outer: int,
    tensors: tuple[Tensor, ...],
    more: tuple[int, ...] = (),
    *,
    taps: int = 0,
    lines: int = LINES,
    rows: int = 1,
    programs: int = 0,
) -> None:
    """Run a kernel on `tensors`. `shape`: of the images at full size, with the channels that are summed.

    `more`: what it takes besides, such as the filters' strides; `lines`: of a place; `rows`: programs that share places;
    `programs`: that share all of them, 0 for as many as are quickest.
    """
    count, inner, height, width = shape
    places = count * height * width // lines
    programs = programs or programs_of(how, places, processors(tensors[0].device))
    with torch.cuda.device_of(tensors[0]):  # type: ignore[no-untyped-call]  # Triton launches where the process is
        kernel[(programs, rows)](
            *tensors, places, programs, *more,
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
    return _convolved(x, weight, back, None)[0]


def our_convolve_sums(x: Tensor, weight: Tensor, pivot: Tensor, programs: int) -> tuple[Tensor, Tensor]:
    """`convolve`, and what each program found (programs, 2, OUT): the sums of result - pivot (OUT,), and of its square."""
    return _convolved(x, weight, False, pivot, programs)


def _convolution(inner: int, outer: int) -> tuple[Any, How, dict[str, Any]]:
    """The kernel for so many channels, its shape, and what it is launched with besides."""
    if inner > MOST_IN:
        return convolve_taps, CONVOLVE_TAPS, {"taps": rounded(inner), "lines": 1}
    taps = rounded(SIDE * inner)
    return convolve_lines, CONVOLVE_FEW.get((taps, rounded(outer)), CONVOLVE[taps]), {"lines": LINES}


def _correlation(inner: int, outer: int) -> tuple[Any, How, dict[str, Any]]:
    """The same for the filters' gradients."""
    if inner > MOST_IN:
        return correlate_taps, CORRELATE_TAPS, {"taps": rounded(inner), "lines": 1, "rows": SIDE}
    taps = rounded(SIDE * inner)
    return correlate_lines, CORRELATE_FEW.get((taps, rounded(outer)), CORRELATE[taps]), {"lines": LINES}


def shared(shape: Shape, outer: int, processors: int) -> int:
    """How many programs are quickest for a convolution, where so many run at once."""
    count, inner, height, width = shape
    _, how, given = _convolution(inner, outer)
    return programs_of(how, count * height * width // int(given["lines"]), processors)


def _convolved(x: Tensor, weight: Tensor, back: bool, pivot: Tensor | None, programs: int = 0) -> tuple[Tensor, Tensor]:
    x, outer, sums = as_last(x), weight.shape[1 if back else 0], pivot is not None
    y = torch.empty((x.shape[0], outer, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    parts = x.new_empty((programs, 2, outer), dtype=torch.float32)
    kernel, how, given = _convolution(x.shape[1], outer)
    filters, strides = turned(weight, back)
    tensors = x, filters, y, y if pivot is None else pivot, parts if sums else y
    launch(kernel, how, x.shape, outer, tensors, (*strides, sums), programs=programs, **given)
    return y, parts


def our_correlate(x: Tensor, g: Tensor) -> Tensor:
    """`correlate` by our kernel: each program's sum, and the sum of these."""
    x, g = as_last(x), as_last(g)
    inner, outer = x.shape[1], g.shape[1]
    kernel, how, given = _correlation(inner, outer)
    programs = programs_of(how, x.numel() // inner // given["lines"], processors(x.device))
    parts = torch.empty((programs, outer * 9 * inner), dtype=torch.float32, device=x.device)
    launch(kernel, how, x.shape, outer, (x, g, parts), programs=programs, **given)
    return added(parts).view(outer, SIDE, SIDE, inner).permute(0, 3, 1, 2)


def added(parts: Tensor) -> Tensor:
    """(programs, size) float32 -> (size,): always in the same order. torch's own sum takes three times as long (LOG.md)."""
    programs, size = parts.shape
    total = parts.new_empty(size)
    rows, columns = SUMMED_MANY if size >= MANY else SUMMED
    with torch.cuda.device_of(parts):  # type: ignore[no-untyped-call]
        add_parts[(triton.cdiv(size, columns),)](parts, total, programs, size, rows, columns, num_warps=4)
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


def meant(inner: int, outer: int, height: int, width: int) -> bool:
    """Whether our kernels are for such images."""
    if height * width <= SMALL and MOST_IN < inner <= MOST_OUT and outer <= MOST_OUT:
        return True
    return height % LINES == 0 and inner <= MOST_IN and outer <= MOST_OUT


def _ours(kind: str, x: Tensor, outer: int, strides: tuple[int, ...] = ()) -> bool:
    """Whether our kernel is taken for these images; it counts their values in 32 bits."""
    return (
        few(x.shape, outer)
        and meant(x.shape[1], outer, *x.shape[2:])
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
