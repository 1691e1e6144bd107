"""3 x 3 convolutions with few channels, in Triton, for compiled steps on a GPU.

cuDNN has no quick kernels for 3, 16 or 32 channels: in a step of ResNet-20 at batch 512 they took half of the time, several
times what it takes to read and write the images once (LOG.md). Here the three taps of a filter row, which lie beside each other
in memory when channels come last, are one row of a matrix product, and four lines of images are worked on together, so that a
line is read once for the three filter rows that need it. bf16 in, float32 sums; weights and their gradients stay float32, so
nothing is cast in a pass of its own. No atomics: the same step gives the same bits.

A kernel is used only where it has given torch's answer on this GPU, for as many images that lie as they will (`_right`);
elsewhere torch's own is.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

SIDE, LINES = 3, 4  # of a filter; of the images that are worked on together
MOST_IN, MOST_OUT = 32, 64  # channels
MOST_PROVED = 2048  # images that a kernel is tried with
TOLERATED = 1e-2  # relative error of a sum of products of bf16 numbers that is rounded to bf16


@triton.jit  # type: ignore[untyped-decorator]
def _line(x, inside, row, HEIGHT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The taps at x; zeros where a line is outside of the image."""
    return tl.load(x, mask=inside & ((row >= 0) & (row < HEIGHT))[:, None], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _convolve(  # type: ignore[no-untyped-def]
    x, weight, y, places, programs, s_out, s_in, s_row, s_column,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    TAPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[p, o] = sum of x[p + offset, i] * weight[o, i, row, column]; x (pixels, IN) and y (pixels, OUT), channels last.

    A place is a column of four lines. TAPS and COLUMNS: 3 * IN and OUT, rounded up to powers of two of at least 16.
    """
    k, o = tl.arange(0, TAPS), tl.arange(0, COLUMNS)
    column, i = k // IN, k % IN
    where = weight + column[:, None] * s_column + i[:, None] * s_in + o[None, :] * s_out
    known = (k < 3 * IN)[:, None] & (o < OUT)[None, :]
    above = tl.load(where, mask=known, other=0.0).to(x.dtype.element_ty)
    level = tl.load(where + s_row, mask=known, other=0.0).to(x.dtype.element_ty)
    below = tl.load(where + 2 * s_row, mask=known, other=0.0).to(x.dtype.element_ty)
    for block in range(tl.program_id(0), (places + BLOCK - 1) // BLOCK, programs):
        place = block * BLOCK + tl.arange(0, BLOCK)
        p = place // WIDTH * (4 * WIDTH) + place % WIDTH
        row = place // WIDTH * 4 % HEIGHT
        there = (place % WIDTH)[:, None] + column[None, :] - 1
        inside = (k < 3 * IN)[None, :] & (there >= 0) & (there < WIDTH) & (place < places)[:, None]
        taps = x + p[:, None] * IN + (k - IN)[None, :]
        to = y + p[:, None] * OUT + o[None, :]
        out = (place < places)[:, None] & (o < OUT)[None, :]
        line0 = _line(taps - WIDTH * IN, inside, row - 1, HEIGHT)
        line1 = tl.load(taps, mask=inside, other=0.0)
        line2 = tl.load(taps + WIDTH * IN, mask=inside, other=0.0)
        line3 = tl.load(taps + 2 * WIDTH * IN, mask=inside, other=0.0)
        line4 = tl.load(taps + 3 * WIDTH * IN, mask=inside, other=0.0)
        line5 = _line(taps + 4 * WIDTH * IN, inside, row + 4, HEIGHT)
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
    column = k // IN
    above = tl.full((TAPS, COLUMNS), 0.0, tl.float32)
    level = tl.full((TAPS, COLUMNS), 0.0, tl.float32)
    below = tl.full((TAPS, COLUMNS), 0.0, tl.float32)
    for block in range(tl.program_id(0), (places + BLOCK - 1) // BLOCK, programs):
        place = block * BLOCK + tl.arange(0, BLOCK)
        p = place // WIDTH * (4 * WIDTH) + place % WIDTH
        row = place // WIDTH * 4 % HEIGHT
        there = (place % WIDTH)[:, None] + column[None, :] - 1
        inside = (k < 3 * IN)[None, :] & (there >= 0) & (there < WIDTH) & (place < places)[:, None]
        taps = x + p[:, None] * IN + (k - IN)[None, :]
        at = g + p[:, None] * OUT + o[None, :]
        out = (place < places)[:, None] & (o < OUT)[None, :]
        g0 = tl.load(at, mask=out, other=0.0)
        g1 = tl.load(at + WIDTH * OUT, mask=out, other=0.0)
        g2 = tl.load(at + 2 * WIDTH * OUT, mask=out, other=0.0)
        g3 = tl.load(at + 3 * WIDTH * OUT, mask=out, other=0.0)
        line = tl.trans(_line(taps - WIDTH * IN, inside, row - 1, HEIGHT))
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
        line = tl.trans(_line(taps + 4 * WIDTH * IN, inside, row + 4, HEIGHT))
        below = tl.dot(line, g3, below)
    where = parts + tl.program_id(0) * (9 * IN * OUT) + k[:, None] + o[None, :] * (9 * IN)
    known = (k < 3 * IN)[:, None] & (o < OUT)[None, :]
    tl.store(where, above, mask=known)
    tl.store(where + 3 * IN, level, mask=known)
    tl.store(where + 6 * IN, below, mask=known)


class How(NamedTuple):
    """A kernel's shape: places a block, warps, pipeline stages, programs a multiprocessor. By measurement (LOG.md)."""

    block: int
    warps: int
    stages: int
    each: int


CONVOLVE = {16: How(128, 4, 1, 8), 32: How(64, 4, 2, 4), 64: How(64, 4, 1, 4), 128: How(64, 4, 1, 2)}  # by TAPS
CORRELATE = {16: How(128, 4, 2, 2), 32: How(64, 4, 2, 2), 64: How(64, 4, 3, 1), 128: How(32, 4, 3, 1)}


def _rounded(count: int) -> int:
    return max(16, 1 << (count - 1).bit_length())


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 2


def _programs(how: How, x: Tensor) -> int:
    places = x.shape[0] * x.shape[2] * x.shape[3] // LINES
    return int(min(_processors(x.device) * how.each, triton.cdiv(places, how.block)))


def _launch(kernel: Any, how: How, x: Tensor, others: tuple[Tensor, ...], strides: tuple[int, ...], outer: int) -> None:
    """Run a kernel on images x (N, IN, H, W); `others` are its further tensors, the result last."""
    count, inner, height, width = x.shape
    programs = _programs(how, x)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton launches where the process is
        kernel[(programs,)](
            x, *others, count * height * width // LINES, programs, *strides,
            height, width, inner, outer, _rounded(SIDE * inner), _rounded(outer),
            how.block, num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def our_convolve(x: Tensor, weight: Tensor, back: bool) -> Tensor:
    """`convolve` by our kernel."""
    x, outer = _last(x), weight.shape[1 if back else 0]
    s_out, s_in, s_row, s_column = weight.stride()
    y = torch.empty((x.shape[0], outer, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if back:  # the same sum with filters turned by half a circle, and channels exchanged
        weight = weight.as_strided((1,), (1,), weight.storage_offset() + 2 * s_row + 2 * s_column)
        s_out, s_in, s_row, s_column = s_in, s_out, -s_row, -s_column
    how = CONVOLVE[_rounded(SIDE * x.shape[1])]
    _launch(_convolve, how, x, (weight, y), (s_out, s_in, s_row, s_column), outer)
    return y


def our_correlate(x: Tensor, g: Tensor) -> Tensor:
    """`correlate` by our kernel: each program's sum, and the sum of these."""
    x, g = _last(x), _last(g)
    inner, outer = x.shape[1], g.shape[1]
    how = CORRELATE[_rounded(SIDE * inner)]
    parts = torch.empty((_programs(how, x), outer, SIDE, SIDE, inner), dtype=torch.float32, device=x.device)
    _launch(_correlate, how, x, (g, parts), (), outer)
    return parts.sum(0).permute(0, 3, 1, 2)


def torch_convolve(x: Tensor, weight: Tensor, back: bool) -> Tensor:
    """`convolve` by torch."""
    weight = weight.to(x.dtype)
    return _last(F.conv_transpose2d(x, weight, padding=1) if back else F.conv2d(x, weight, padding=1))


def torch_correlate(x: Tensor, g: Tensor) -> Tensor:
    """`correlate` by torch."""
    weight = torch.empty((g.shape[1], x.shape[1], SIDE, SIDE), dtype=x.dtype, device=x.device)
    ones, none, wanted = [1, 1], [0, 0], [False, True, False]
    found: Tensor = torch.ops.aten.convolution_backward(g, x, weight, None, ones, ones, ones, False, none, 1, wanted)[1]
    return found.to(torch.float32, memory_format=torch.channels_last)


def _meant(inner: int, outer: int, height: int) -> bool:
    """Whether our kernels are for such images."""
    return height % LINES == 0 and inner <= MOST_IN and outer <= MOST_OUT


def _ours(kind: str, x: Tensor, outer: int, strides: tuple[int, ...] = ()) -> bool:
    """Whether our kernel is taken for these images; it counts their values in 32 bits."""
    count, inner, height, width = x.shape
    few = count * height * width * max(inner, outer) < 2**31
    return (
        few
        and _meant(inner, outer, height)
        and _right(kind, (min(count, MOST_PROVED), *x.shape[1:]), outer, strides, x.dtype, x.device)
    )


@functools.cache
def _right(
    kind: str, shape: tuple[int, ...], outer: int, strides: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether our kernel gives torch's answer on this device, with images and filters that lie as they will."""
    seeded = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=seeded, device=device)

    x, back = _last(draw(*shape).to(dtype)), kind == "back"
    try:
        with torch.no_grad():
            if kind == "correlate":
                g = _last(draw(shape[0], outer, *shape[2:]).to(dtype))
                ours, wanted = our_correlate(x, g), torch_correlate(x.float(), g.float())
            else:
                filters = (shape[1], outer) if back else (outer, shape[1])
                weight = torch.empty_strided((*filters, SIDE, SIDE), strides, device=device)
                weight.copy_(draw(*weight.shape).to(dtype))
                ours, wanted = our_convolve(x, weight, back), torch_convolve(x.float(), weight, back)
            return bool((ours.float() - wanted).norm() < TOLERATED * wanted.norm())
    except (triton.runtime.errors.TritonError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
            raise
        return False  # what Triton cannot do here, torch can


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


class Quick(nn.Conv2d):
    """The same convolution; with the kernels of this file in training mode, where autocast is on."""

    precision = torch.bfloat16  # as autocast has it in cifar.train

    def forward(self, x: Tensor) -> Tensor:
        asked = self.precision == torch.float32 or torch.is_autocast_enabled(x.device.type)
        if not (self.training and asked):
            return super().forward(x)
        y: Tensor = convolve(x.to(self.precision), self.weight, False)
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]


@torch.no_grad()
def quicken(model: nn.Module, images: Tensor) -> int:
    """Let the convolutions that these kernels are for use them -> how many. Weights stay where they are.

    images (1, 3, H, W), with any content: they say how large the images are that each convolution gets.
    """
    heights: dict[nn.Conv2d, int] = {}

    def watch(module: nn.Module, given: tuple[Any, ...]) -> None:
        if given and isinstance(module, nn.Conv2d):
            heights[module] = given[0].shape[2]

    watched = [m for m in model.modules() if type(m) is nn.Conv2d and _fits(m)]
    hooks, was = [module.register_forward_pre_hook(watch) for module in watched], model.training
    try:
        model.eval()(images)
    finally:
        model.train(was)
        for hook in hooks:
            hook.remove()
    found = [m for m, height in heights.items() if _meant(m.in_channels, m.out_channels, height)]
    for module in found:
        module.__class__ = Quick
    return len(found)


def _fits(module: nn.Conv2d) -> bool:
    plain = module.groups == 1 and module.padding_mode == "zeros" and module.padding in ((1, 1), "same")
    near = module.kernel_size == (SIDE, SIDE) and module.stride == module.dilation == (1, 1)
    return (
        plain
        and near
        and max(module.in_channels / MOST_IN, module.out_channels / MOST_OUT) <= 1
        and module.weight.requires_grad
    )
