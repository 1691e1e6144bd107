"""3 x 3 convolutions with few channels, in Triton, for compiled steps on a GPU.

cuDNN has no quick kernels for 3, 16 or 32 channels: in a step of ResNet-20 at batch 512 they took half of the time, several
times what it takes to read and write the images once (LOG.md). Input is bf16, sums are float32. Weights and their gradients
stay float32, so nothing is cast in a pass of its own. There are no atomic operations: the same step gives the same bits.

The kernels work on strips: columns of four neighbouring pixels (conv3x3_kernels.py); for small images with many channels on
single pixels (conv3x3_tap_kernels.py). IN and OUT are the channels of the images and of the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from cifar.kernels.triton.conv3x3_kernels import add_partials, convolve_lines, correlate_lines
from cifar.kernels.triton.conv3x3_tap_kernels import convolve_taps, correlate_taps
from cifar.kernels.triton.launch import (
    LaunchConfig,
    Shape,
    choose_num_programs,
    count_multiprocessors,
    empty_channels_last,
    round_up_to_tile,
    to_channels_last,
)
from cifar.kernels.triton.verify import KernelCase, RandomInputs, Verifier, is_close

KERNEL_SIZE = 3
STRIP_ROWS = 4  # pixels of a strip
MAX_IN_CHANNELS, MAX_OUT_CHANNELS = 32, 64
MAX_TAP_PIXELS = 64  # of an image; up to that size as many channels may go in as come out

# by TAPS; the overrides by TAPS and COLUMNS
CONVOLVE_CONFIGS = {
    16: LaunchConfig(128, 4, 1, 8),
    32: LaunchConfig(64, 4, 2, 4),
    64: LaunchConfig(64, 4, 1, 4),
    128: LaunchConfig(64, 4, 1, 2),
}
CONVOLVE_OVERRIDES = {
    (16, 16): LaunchConfig(128, 4, 1, 4),
    (64, 16): LaunchConfig(64, 2, 2, 4),
    (128, 32): LaunchConfig(128, 8, 1, 1),
}
CORRELATE_CONFIGS = {
    16: LaunchConfig(128, 4, 2, 2),
    32: LaunchConfig(64, 4, 2, 2),
    64: LaunchConfig(64, 4, 3, 1),
    128: LaunchConfig(32, 4, 3, 1),
}
CORRELATE_OVERRIDES = {(128, 32): LaunchConfig(64, 4, 2, 1)}
CONVOLVE_TAPS_CONFIG, CORRELATE_TAPS_CONFIG = LaunchConfig(256, 8, 3, 1), LaunchConfig(64, 4, 3, 0.34)
SUM_TILE, WIDE_SUM_TILE = (128, 8), (64, 32)  # rows that are added at once, and columns of a program
WIDE_SUM_SIZE = 16_384  # columns from which on WIDE_SUM_TILE is used


@dataclass(frozen=True)
class LaunchPlan:
    """A kernel for a convolution, and how it is launched."""

    kernel: Any
    config: LaunchConfig
    taps: int  # rows of its matrix products, rounded up to a tile
    strip_rows: int = STRIP_ROWS
    grid_rows: int = 1  # programs that share a block, each for other rows of the filter

    def count_strips(self, shape: Shape) -> int:
        count, _, height, width = shape
        return count * height * width // self.strip_rows


def launch_kernel(
    plan: LaunchPlan,
    shape: Shape,
    out_channels: int,
    tensors: tuple[Tensor, ...],
    extra_args: tuple[int, ...] = (),
    num_programs: int = 0,
) -> None:
    """Run a kernel on `tensors`. `shape`: of the images at full size, with the channels that are summed.

    `extra_args`: what the kernel takes besides, such as the filters' strides. `num_programs`: how many share all strips; 0:
    as many as are quickest.
    """
    _, in_channels, height, width = shape
    config, num_strips = plan.config, plan.count_strips(shape)
    num_programs = num_programs or choose_num_programs(config, num_strips, count_multiprocessors(tensors[0].device))
    with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
        plan.kernel[(num_programs, plan.grid_rows)](
            *tensors, num_strips, num_programs, *extra_args,
            height, width, in_channels, out_channels, plan.taps, round_up_to_tile(out_channels),
            config.block, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip


def plan_convolution(in_channels: int, out_channels: int) -> LaunchPlan:
    """The quickest kernel for so many channels."""
    if in_channels > MAX_IN_CHANNELS:
        return LaunchPlan(convolve_taps, CONVOLVE_TAPS_CONFIG, round_up_to_tile(in_channels), strip_rows=1)
    taps = round_up_to_tile(KERNEL_SIZE * in_channels)
    config = CONVOLVE_OVERRIDES.get((taps, round_up_to_tile(out_channels)), CONVOLVE_CONFIGS[taps])
    return LaunchPlan(convolve_lines, config, taps)


def plan_correlation(in_channels: int, out_channels: int) -> LaunchPlan:
    """The quickest kernel for the filters' gradients."""
    if in_channels > MAX_IN_CHANNELS:
        taps = round_up_to_tile(in_channels)
        return LaunchPlan(correlate_taps, CORRELATE_TAPS_CONFIG, taps, strip_rows=1, grid_rows=KERNEL_SIZE)
    taps = round_up_to_tile(KERNEL_SIZE * in_channels)
    config = CORRELATE_OVERRIDES.get((taps, round_up_to_tile(out_channels)), CORRELATE_CONFIGS[taps])
    return LaunchPlan(correlate_lines, config, taps)


def choose_conv_programs(shape: Shape, out_channels: int, num_multiprocessors: int) -> int:
    """How many programs are quickest for a convolution of images (N, IN, H, W)."""
    plan = plan_convolution(shape[1], out_channels)
    return choose_num_programs(plan.config, plan.count_strips(shape), num_multiprocessors)


def rotate_filter(weight: Tensor, transposed: bool) -> tuple[Tensor, tuple[int, ...]]:
    """Where the filters begin, and their strides (out, in, row, column).

    `transposed`: those of the filters rotated by 180 degrees, with in and out exchanged. Nothing is copied.
    """
    s_out, s_in, s_row, s_column = weight.stride()
    if not transposed:
        return weight, (s_out, s_in, s_row, s_column)
    last = weight.as_strided((1,), (1,), weight.storage_offset() + 2 * s_row + 2 * s_column)
    return last, (s_in, s_out, -s_row, -s_column)


# -- each operator by Triton and by torch ------------------------------------------------------------------------------


def convolve_3x3_triton(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """`convolve_3x3` by our kernel."""
    return _launch_convolution(x, weight, transposed)[0]


def convolve_3x3_sums_triton(x: Tensor, weight: Tensor, pivot: Tensor, num_programs: int) -> tuple[Tensor, Tensor]:
    """`convolve_3x3`, and the sums of result - pivot (OUT,) and of its square, by each program: (num_programs, 2, OUT)."""
    return _launch_convolution(x, weight, False, pivot, num_programs)


def _launch_convolution(
    x: Tensor, weight: Tensor, transposed: bool, pivot: Tensor | None = None, num_programs: int = 0
) -> tuple[Tensor, Tensor]:
    """The result, and the sums where there is a pivot."""
    x, out_channels, has_sums = to_channels_last(x), weight.shape[1 if transposed else 0], pivot is not None
    y = empty_channels_last(x, (x.shape[0], out_channels, *x.shape[2:]))
    partials = x.new_empty((num_programs, 2, out_channels), dtype=torch.float32)
    filters, strides = rotate_filter(weight, transposed)
    tensors = x, filters, y, y if pivot is None else pivot, partials if has_sums else y
    plan = plan_convolution(x.shape[1], out_channels)
    launch_kernel(plan, x.shape, out_channels, tensors, (*strides, has_sums), num_programs)
    return y, partials


def correlate_3x3_triton(x: Tensor, g: Tensor) -> Tensor:
    """`correlate_3x3` by our kernels: one makes each program's sum, another adds these."""
    x, g = to_channels_last(x), to_channels_last(g)
    in_channels, out_channels = x.shape[1], g.shape[1]
    plan = plan_correlation(in_channels, out_channels)
    num_programs = choose_num_programs(plan.config, plan.count_strips(x.shape), count_multiprocessors(x.device))
    partials = torch.empty((num_programs, out_channels * 9 * in_channels), dtype=torch.float32, device=x.device)
    launch_kernel(plan, x.shape, out_channels, (x, g, partials), num_programs=num_programs)
    return sum_partials(partials).view(out_channels, KERNEL_SIZE, KERNEL_SIZE, in_channels).permute(0, 3, 1, 2)


def sum_partials(partials: Tensor) -> Tensor:
    """(num_programs, size) float32 -> (size,): always in the same order. torch's sum takes three times as long (LOG.md)."""
    num_programs, size = partials.shape
    total = partials.new_empty(size)
    rows, columns = WIDE_SUM_TILE if size >= WIDE_SUM_SIZE else SUM_TILE
    with torch.cuda.device_of(partials):
        add_partials[(triton.cdiv(size, columns),)](partials, total, num_programs, size, rows, columns, num_warps=4)
    return total


def convolve_3x3_reference(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """`convolve_3x3` by torch."""
    weight = weight.to(x.dtype)
    return to_channels_last(F.conv_transpose2d(x, weight, padding=1) if transposed else F.conv2d(x, weight, padding=1))


def correlate_3x3_reference(x: Tensor, g: Tensor) -> Tensor:
    """`correlate_3x3` by torch."""
    weight = torch.empty((g.shape[1], x.shape[1], KERNEL_SIZE, KERNEL_SIZE), dtype=x.dtype, device=x.device)
    ones, zeros, output_mask = [1, 1], [0, 0], [False, True, False]
    gradients = torch.ops.aten.convolution_backward(g, x, weight, None, ones, ones, ones, False, zeros, 1, output_mask)
    filters: Tensor = gradients[1]
    return filters.to(torch.float32, memory_format=torch.channels_last)


# -- which of the two --------------------------------------------------------------------------------------------------


def supports_shape(in_channels: int, out_channels: int, height: int, width: int) -> bool:
    """Whether our kernels are meant for such images."""
    if (
        height * width <= MAX_TAP_PIXELS
        and MAX_IN_CHANNELS < in_channels <= MAX_OUT_CHANNELS
        and out_channels <= MAX_OUT_CHANNELS
    ):
        return True
    return height % STRIP_ROWS == 0 and in_channels <= MAX_IN_CHANNELS and out_channels <= MAX_OUT_CHANNELS


def _supports_case(case: KernelCase) -> bool:
    return supports_shape(case.shape[1], case.out_channels, *case.shape[2:])


def _matches_reference(case: KernelCase, inputs: RandomInputs) -> bool:
    """With images and filters that lie in memory as those of the case do."""
    count, in_channels, height, width = case.shape
    x, transposed = inputs.draw_images(*case.shape), case.kernel == "transposed"
    if case.kernel == "correlate":
        g = inputs.draw_images(count, case.out_channels, height, width)
        return is_close(correlate_3x3_triton(x, g), correlate_3x3_reference(x.float(), g.float()))
    channels = (in_channels, case.out_channels) if transposed else (case.out_channels, in_channels)
    weight = inputs.draw_filters(*channels, KERNEL_SIZE, KERNEL_SIZE)
    return is_close(convolve_3x3_triton(x, weight, transposed), convolve_3x3_reference(x.float(), weight, transposed))


verifier = Verifier(_supports_case, _matches_reference)


# -- operators ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("cifar::convolve_3x3", mutates_args=())
def convolve_3x3(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """3 x 3, stride 1, zero padding of 1. x (N, IN, H, W), weight (OUT, IN, 3, 3) float32 -> (N, OUT, H, W), channels last.

    `transposed`: the gradient of the images from that of the result: x (N, OUT, H, W) -> (N, IN, H, W).
    """
    out_channels = weight.shape[1 if transposed else 0]
    use_triton = verifier.can_use("transposed" if transposed else "convolve", x, out_channels, weight.stride())
    return (convolve_3x3_triton if use_triton else convolve_3x3_reference)(x, weight, transposed)


@convolve_3x3.register_fake
def _(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    return empty_channels_last(x, (x.shape[0], weight.shape[1 if transposed else 0], *x.shape[2:]))


@torch.library.custom_op("cifar::correlate_3x3", mutates_args=())
def correlate_3x3(x: Tensor, g: Tensor) -> Tensor:
    """The gradient of the filters: x (N, IN, H, W), g (N, OUT, H, W) -> (OUT, IN, 3, 3) float32, channels last."""
    use_triton = verifier.can_use("correlate", x, g.shape[1])
    return (correlate_3x3_triton if use_triton else correlate_3x3_reference)(x, g)


@correlate_3x3.register_fake
def _(x: Tensor, g: Tensor) -> Tensor:
    shape = (g.shape[1], x.shape[1], KERNEL_SIZE, KERNEL_SIZE)
    return torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=torch.channels_last)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.transposed = inputs
    ctx.save_for_backward(x, weight)


def _convolve_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    if ctx.transposed:
        raise NotImplementedError("these convolutions have no second derivative")
    x, weight = ctx.saved_tensors
    images = convolve_3x3(g, weight, True) if ctx.needs_input_grad[0] else None
    return images, correlate_3x3(x, g) if ctx.needs_input_grad[1] else None, None


convolve_3x3.register_autograd(_convolve_backward, setup_context=_save_for_backward)
