"""Depthwise 3 x 3 convolutions between two BatchNorms, in training, for compiled steps on a GPU.

A depthwise convolution does nine multiplications a value, so memory holds it. Those of MobileNetV2 at batch 512 read 0.85 GB
and write 0.67 GB in a forward pass in bf16. So the fewer passes over the images, the better:

* forward: the kernel reads the result of the convolution before it, applies that one's BatchNorm and activation to what it
  reads, and sums up what it writes for its own BatchNorm. The activated images are never in memory;
* backward: one kernel makes the gradient through its own BatchNorm and activation, of its input, of its filters, and the sums
  that the BatchNorm before it needs.

Weights and their gradients are float32, sums are float32. There are no atomic operations: the same step gives the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from cifar.kernels.triton.batch_norm import RELU6, activate, gradient_sums, per_channel
from cifar.kernels.triton.choices import CHOICES
from cifar.kernels.triton.conv3x3 import sum_partials
from cifar.kernels.triton.depthwise_kernels import depthwise_backward, depthwise_forward
from cifar.kernels.triton.launch import (
    Shape,
    count_multiprocessors,
    empty_channels_last,
    size_unit,
    to_channels_last,
)
from cifar.kernels.triton.verify import KernelCase, RandomInputs, Verifier, is_close

NUM_TAPS = 9
MAX_TRIED_IMAGES = 256  # a kernel is compared with torch on at most so many
NUM_TIMED_CALLS = 5


class DepthwiseConfig(NamedTuple):
    """How a kernel is launched."""

    rows: int  # of a strip
    values: int  # neighbouring channels of a thread
    warps: int
    per_multiprocessor: int  # programs, over all blocks of channels


FORWARD_PER_MULTIPROCESSOR = 4  # the same for all, because the number of sums is a constant of compiled code
FORWARD_CONFIGS = (
    DepthwiseConfig(2, 2, 4, FORWARD_PER_MULTIPROCESSOR),  # 80 registers
    DepthwiseConfig(4, 2, 4, FORWARD_PER_MULTIPROCESSOR),  # 128
)
BACKWARD_CONFIGS = (DepthwiseConfig(2, 2, 4, 3), DepthwiseConfig(4, 2, 4, 2))  # 139 and 220


class DepthwiseOptions(NamedTuple):
    """What a convolution is between."""

    stride: int
    has_norm: int  # 1: the BatchNorm before it is part of the kernel, 0: it is not
    activation_in: int  # of that: NO_ACTIVATION, RELU or RELU6
    activation: int  # behind the BatchNorm after it


# -- each operator by Triton and by torch ------------------------------------------------------------------------------


def block_channels(channels: int) -> int:
    """How many channels a program works on: 64 bytes, or 32 where a half of those would lie behind the last channel."""
    return 16 if channels < 64 and 0 < channels % 32 <= 16 else 32


def choose_depthwise_programs(channels: int, num_multiprocessors: int) -> int:
    """How many programs of the forward kernel share all strips of a block of channels."""
    num_blocks = -(-channels // block_channels(channels))
    return max(1, num_multiprocessors * FORWARD_PER_MULTIPROCESSOR // num_blocks)


def count_outputs(size: int, stride: int) -> int:
    """Rows or columns of the result."""
    return (size - 1) // stride + 1


def depthwise_sums_triton(
    x: Tensor,
    weight: Tensor,
    pivot: Tensor,
    norm_in: Sequence[Tensor],
    eps_in: float,
    options: Sequence[int],
    num_programs: int,
    config: DepthwiseConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`depthwise_sums` by our kernel."""
    x, (stride, has_norm, activation_in, _) = to_channels_last(x), options
    config = config or chosen_config("forward", x, options)
    y, partials = _empty_results(x, stride, num_programs)
    columns, unit = block_channels(x.shape[1]), size_unit(x.shape[1])
    block = config.values * 32 * config.warps // columns
    strips = len(x) * triton.cdiv(y.shape[2], config.rows)
    with torch.cuda.device_of(x):
        depthwise_forward[(triton.cdiv(x.shape[1], columns), num_programs)](
            x, weight, y, pivot, partials, *(norm_in or (pivot, pivot, pivot)), eps_in,
            strips, num_programs, *x.shape[2:], *y.shape[2:], x.shape[1] // unit,
            stride, bool(has_norm), activation_in, unit, columns, block, config.rows, num_warps=config.warps,
        )  # fmt: skip
    return y, partials


def depthwise_gradients_triton(
    images: Sequence[Tensor],
    weight: Tensor,
    norm: Sequence[Tensor],
    norm_in: Sequence[Tensor],
    eps: Sequence[float],
    options: Sequence[int],
    config: DepthwiseConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`depthwise_gradients` by our kernels: one makes each program's sums, another adds these."""
    g, y, x = map(to_channels_last, images)
    stride, has_norm, activation_in, activation = options
    config = config or chosen_config("backward", x, options)
    channels = x.shape[1]
    columns, unit = block_channels(channels), size_unit(channels)
    block, num_blocks = config.values * 32 * config.warps // columns, triton.cdiv(channels, columns)
    strips = len(x) * triton.cdiv(x.shape[2], config.rows)
    num_programs = max(1, count_multiprocessors(x.device) * config.per_multiprocessor // num_blocks)
    num_programs = min(num_programs, triton.cdiv(strips, block))
    h = empty_channels_last(x, x.shape)
    partials = x.new_empty((num_programs, count_sums(options) * channels), dtype=torch.float32)
    with torch.cuda.device_of(x):
        depthwise_backward[(num_blocks, num_programs)](
            g, y, x, weight, h, partials, *norm, eps[0], *(norm_in or norm[:3]), eps[1], y.numel() // channels,
            strips, num_programs, *x.shape[2:], *y.shape[2:], channels // unit,
            stride, bool(has_norm), activation_in, activation, unit, columns, block, config.rows, num_warps=config.warps,
        )  # fmt: skip
    return h, sum_partials(partials)


def depthwise_sums_reference(
    x: Tensor,
    weight: Tensor,
    pivot: Tensor,
    norm_in: Sequence[Tensor],
    eps_in: float,
    options: Sequence[int],
    num_programs: int,
) -> tuple[Tensor, Tensor]:
    """`depthwise_sums` by torch: all sums in the place of the first program."""
    stride, _, activation_in, _ = options
    active = activate(_normalise(x, norm_in, eps_in)[0], activation_in) if norm_in else x.float()
    weight = weight.to(x.dtype).float()
    y = to_channels_last(F.conv2d(active, weight, None, stride, 1, 1, x.shape[1]).to(x.dtype))
    centered = y.float() - per_channel(torch.where(pivot.isfinite(), pivot, 0.0))
    sums = torch.stack([centered.sum((0, 2, 3)), centered.square().sum((0, 2, 3))])
    return y, torch.cat([sums[None], sums.new_zeros((num_programs - 1, *sums.shape))])


def depthwise_gradients_reference(
    images: Sequence[Tensor],
    weight: Tensor,
    norm: Sequence[Tensor],
    norm_in: Sequence[Tensor],
    eps: Sequence[float],
    options: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """`depthwise_gradients` by torch."""
    (g, y, x), (stride, _, activation_in, activation), sums = images, options, norm[3]
    result, y_hat, scale = _normalise(y, norm[:3], eps[0])
    count = y.numel() // y.shape[1]
    g = _mask(g.float(), result, activation)
    g = scale * (g - per_channel(sums[0] / count) - y_hat * per_channel(sums[1] / count))
    before, x_hat = x.float(), x
    if norm_in:
        before, x_hat, _ = _normalise(x, norm_in, eps[1])
    active = activate(before, activation_in) if norm_in else before
    pair, none = [1, 1], [0, 0]
    h, filters, _ = torch.ops.aten.convolution_backward(
        g, active, weight.to(x.dtype).float(), None, [stride] * 2, pair, pair, False, none, x.shape[1], [True, True, False]
    )
    if not norm_in:
        return to_channels_last(h.to(x.dtype)), filters.flatten()
    h = to_channels_last(_mask(h, before, activation_in).to(x.dtype))
    first, second = h.float().sum((0, 2, 3)), (h.float() * x_hat).sum((0, 2, 3))
    return h, torch.cat([filters.flatten(), first, second])


def _normalise(x: Tensor, norm: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm's result, x in standard deviations from the mean, and the factor of x; float32. norm: moments, weight, bias."""
    moments, weight, bias = norm
    inv_std = per_channel(torch.rsqrt(moments[1] + eps))
    x_hat = (x.float() - per_channel(moments[0])) * inv_std
    return x_hat * per_channel(weight) + per_channel(bias), x_hat, inv_std * per_channel(weight)


def _mask(g: Tensor, x: Tensor, activation: int) -> Tensor:
    """The gradient before the activation whose input was x."""
    if not activation:
        return g
    return torch.where((x > 0) & (x < 6) if activation == RELU6 else x > 0, g, 0.0)


def count_sums(options: Sequence[int]) -> int:
    """Sums of each channel in the backward kernel: the filters' gradients, and what BatchNorm before it needs."""
    return NUM_TAPS + 2 if options[1] else NUM_TAPS


def _empty_results(x: Tensor, stride: int, num_programs: int) -> tuple[Tensor, Tensor]:
    """Room for the result and for the sums."""
    count, channels, height, width = x.shape
    y = empty_channels_last(x, (count, channels, count_outputs(height, stride), count_outputs(width, stride)))
    return y, torch.empty((num_programs, 2, channels), dtype=torch.float32, device=x.device)


# -- which of the two --------------------------------------------------------------------------------------------------


def _name_kind(kernel: str, shape: Shape, options: Sequence[int]) -> str:
    """What one compiled kernel is for. All layers of a kind use the configuration that was quickest for the first one."""
    return f"depthwise {kernel} {tuple(options)} {size_unit(shape[1])} {block_channels(shape[1])}"


def chosen_config(kernel: str, x: Tensor, options: Sequence[int]) -> DepthwiseConfig:
    """The quickest one for this kind, or the first where none has been timed."""
    configs = FORWARD_CONFIGS if kernel == "forward" else BACKWARD_CONFIGS
    rows = CHOICES.find(_name_kind(kernel, x.shape, options), x.device)
    return next((config for config in configs if config.rows == rows), configs[0])


def _supports_case(case: KernelCase) -> bool:
    return case.dtype != torch.float64


def _draw_case(case: KernelCase, inputs: RandomInputs) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[float]]:
    """Images, filters, BatchNorm after and before the convolution (moments, weight, bias), and eps."""
    (count, channels, height, width), options = case.shape, case.options
    draw = inputs.draw_normal
    x = draw(min(count, MAX_TRIED_IMAGES), channels, height, width) * (1 + draw(channels, 1, 1).abs()) + draw(channels, 1, 1)
    x = to_channels_last(x.to(case.dtype))
    weight = draw(channels, 1, 3, 3).to(case.dtype).float()

    def draw_norm() -> list[Tensor]:
        return [torch.stack([draw(channels), draw(channels).square() + 0.5]), 1 + draw(channels).abs(), draw(channels)]

    return x, weight, draw_norm(), draw_norm() if options[1] else [], [1e-3, 1e-5]


def _matches_reference(case: KernelCase, inputs: RandomInputs) -> bool:
    x, weight, norm, norm_in, eps = _draw_case(case, inputs)
    options = case.options
    pivot = 0.1 * inputs.draw_normal(x.shape[1])
    num_programs = choose_depthwise_programs(x.shape[1], count_multiprocessors(x.device))
    expected, sums = depthwise_sums_reference(x, weight, pivot, norm_in, eps[1], options, 1)
    if case.kernel == "forward":
        y, partials = depthwise_sums_triton(x, weight, pivot, norm_in, eps[1], options, num_programs)
        return is_close(y, expected.float()) and all(map(is_close, partials.sum(0), sums[0]))
    g = to_channels_last(inputs.draw_normal(*expected.shape).to(x.dtype))
    norm.append(0.1 * inputs.draw_normal(2, x.shape[1]) * (expected.numel() // x.shape[1]))
    given = (g, expected, x), weight, norm, norm_in, eps, options
    (h, totals), (wanted, wanted_totals) = depthwise_gradients_triton(*given), depthwise_gradients_reference(*given)
    size = NUM_TAPS * x.shape[1]
    # sums of many signs: compared all together, because each may be near zero
    parts = [(h, wanted.float()), (totals[:size], wanted_totals[:size])]
    if norm_in:
        parts.append((totals[size:], wanted_totals[size:]))
    return all(is_close(*pair) for pair in parts)


verifier = Verifier(_supports_case, _matches_reference)


def is_worthwhile(shape: Shape, dtype: torch.dtype, device: torch.device, options: DepthwiseOptions) -> bool:
    """Whether both kernels are right for such images and, together, faster than torch's three kernels of the convolution alone.

    shape: (N, C, H, W) of what goes in. The first call of a kind also chooses among the configurations, by time.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        probe = torch.empty((1, *shape[1:]), dtype=dtype, device=device)
        kernels = "forward", "backward"
        if device.type == "cuda":
            name = f"depthwise {tuple(shape)} {dtype} {tuple(options)}"
            is_quicker = CHOICES.get(name, device, lambda: _is_quicker(shape, dtype, device, options))
            if not is_quicker:
                return False
        return all(verifier.can_use(kernel, probe, shape[1], tuple(options), shape) for kernel in kernels)


def _is_quicker(shape: Shape, dtype: torch.dtype, device: torch.device, options: DepthwiseOptions) -> bool:
    case = KernelCase("forward", tuple(shape), shape[1], tuple(options), dtype, device)
    x, weight, norm, norm_in, eps = _draw_case(case, RandomInputs(case))
    x = to_channels_last(x.repeat(-(-shape[0] // len(x)), 1, 1, 1)[: shape[0]])
    try:
        ours = _choose_configs(x, weight, norm, norm_in, eps, options)
    except (triton.runtime.errors.TritonError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
            raise
        return False
    return ours < _time_torch(x, weight, options.stride)


def _draw_like(images: Tensor) -> Tensor:
    """Normal numbers in the place of these images, by a generator of their own: training's must not notice."""
    generator = torch.Generator(images.device).manual_seed(0)
    return images.copy_(torch.randn(images.shape, generator=generator, device=images.device))


def is_matmul_quicker(shape: Shape, out_channels: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a 1 x 1 convolution of images (N, C, H, W) is quicker as a matrix product, forward and backward, on this GPU."""
    if device.type != "cuda":
        return False

    def choose() -> bool:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            count, channels, height, width = shape
            weight = _draw_like(torch.empty((out_channels, channels, 1, 1), dtype=dtype, device=device))
            x = _draw_like(empty_channels_last(weight, shape))
            g = _draw_like(empty_channels_last(weight, (count, out_channels, height, width)))
            rows, g_rows, matrix = (value.permute(0, 2, 3, 1).flatten(0, 2) for value in (x, g, weight))
            one, none = [1, 1], [0, 0]

            def convolve() -> None:
                F.conv2d(x, weight)
                torch.ops.aten.convolution_backward(g, x, weight, None, one, none, one, False, none, 1, [True, True, False])

            def multiply() -> None:
                torch.mm(rows, matrix.t())
                torch.mm(g_rows, matrix)
                torch.mm(g_rows.t(), rows)

            return _time_call(multiply) < _time_call(convolve)

    return bool(CHOICES.get(f"matmul {tuple(shape)} {out_channels} {dtype}", device, choose))


def _choose_configs(
    x: Tensor, weight: Tensor, norm: list[Tensor], norm_in: list[Tensor], eps: list[float], options: DepthwiseOptions
) -> float:
    """Choose the quickest configurations of this kind, if that has not been done -> milliseconds of both kernels."""
    pivot = norm[0][0]
    num_programs = choose_depthwise_programs(x.shape[1], count_multiprocessors(x.device))
    y, _ = _empty_results(x, options.stride, 1)
    g = _draw_like(torch.empty_like(y))
    images, norm = (g, _draw_like(y), x), [*norm, torch.zeros_like(norm[0])]
    total = 0.0
    for kernel, configs in (("forward", FORWARD_CONFIGS), ("backward", BACKWARD_CONFIGS)):
        name, times = _name_kind(kernel, x.shape, options), {}
        known = CHOICES.find(name, x.device)
        for config in configs if known is None else [chosen_config(kernel, x, options)]:

            def call(kernel: str = kernel, config: DepthwiseConfig = config) -> None:
                if kernel == "forward":
                    depthwise_sums_triton(x, weight, pivot, norm_in, eps[1], options, num_programs, config)
                else:
                    depthwise_gradients_triton(images, weight, norm, norm_in, eps, options, config)

            times[config] = _time_call(call)
        best = min(times, key=lambda config: times[config]).rows
        CHOICES.get(name, x.device, functools.partial(int, best))
        total += min(times.values())
    return total


def _time_torch(x: Tensor, weight: Tensor, stride: int) -> float:
    """Milliseconds of the convolution forward and backward by torch, without BatchNorm."""
    weight = weight.to(x.dtype)
    pair, channels = [1, 1], x.shape[1]
    y = F.conv2d(x, weight, None, stride, 1, 1, channels)
    g = _draw_like(torch.empty_like(y))

    def call() -> None:
        F.conv2d(x, weight, None, stride, 1, 1, channels)
        torch.ops.aten.convolution_backward(
            g, x, weight, None, [stride] * 2, pair, pair, False, [0, 0], channels, [True, True, False]
        )

    return _time_call(call)


def _time_call(call: Any) -> float:
    """The least of a few times, in milliseconds, on a GPU."""
    call()
    times = []
    for _ in range(NUM_TIMED_CALLS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)))
    return min(times)


# -- operators ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("cifar::depthwise_sums", mutates_args=())
def depthwise_sums(
    x: Tensor,
    weight: Tensor,
    pivot: Tensor,
    norm_in: Sequence[Tensor],
    eps_in: float,
    options: Sequence[int],
    num_programs: int,
) -> tuple[Tensor, Tensor]:
    """3 x 3 convolution of each channel, zero padding of 1, of activation(BatchNorm(x)); and sums of what comes out.

    x (N, C, H, W), weight (C, 1, 3, 3) float32, pivot (C,) -> y (N, C, H / stride, W / stride), channels last, and
    (num_programs, 2, C) float32: each program's sums of y - pivot and of its square. norm_in: moments (2, C), weight and bias
    of the BatchNorm before, or nothing: then x goes in as it is. options: `DepthwiseOptions`. See `depthwise_norm`.
    """
    use_triton = verifier.can_use("forward", x, x.shape[1], tuple(options))
    compute = depthwise_sums_triton if use_triton else depthwise_sums_reference
    return compute(x, weight, pivot, norm_in, eps_in, options, num_programs)


@depthwise_sums.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    pivot: Tensor,
    norm_in: Sequence[Tensor],
    eps_in: float,
    options: Sequence[int],
    num_programs: int,
) -> tuple[Tensor, Tensor]:
    return _empty_results(x, options[0], num_programs)


@torch.library.custom_op("cifar::depthwise_gradients", mutates_args=())
def depthwise_gradients(
    images: Sequence[Tensor],
    weight: Tensor,
    norm: Sequence[Tensor],
    norm_in: Sequence[Tensor],
    eps: Sequence[float],
    options: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The gradients of `depthwise_norm`: of x (before its activation, but behind its BatchNorm), and sums of each channel.

    images: the gradient g of the result, y, and x. norm: moments, weight and bias of the BatchNorm after the convolution, and
    its `gradient_sums`; norm_in: the first three of the one before; eps: of both. The sums, float32, one after the other:
    filters' gradients (C, 9), and with norm_in the two of its `gradient_sums` (2, C).
    """
    use_triton = verifier.can_use("backward", images[2], weight.shape[0], tuple(options))
    compute = depthwise_gradients_triton if use_triton else depthwise_gradients_reference
    return compute(images, weight, norm, norm_in, eps, options)


@depthwise_gradients.register_fake
def _(
    images: Sequence[Tensor],
    weight: Tensor,
    norm: Sequence[Tensor],
    norm_in: Sequence[Tensor],
    eps: Sequence[float],
    options: Sequence[int],
) -> tuple[Tensor, Tensor]:
    x = images[2]
    return empty_channels_last(x, x.shape), x.new_empty(count_sums(options) * x.shape[1], dtype=torch.float32)


@torch.library.triton_op("cifar::depthwise_norm", mutates_args=())
def depthwise_norm(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    norm: Sequence[Tensor],
    norm_in: Sequence[Tensor],
    eps: Sequence[float],
    options: Sequence[int],
) -> Tensor:
    """activation(BatchNorm(y)) of the result y of `depthwise_sums(x, weight, ...)`, with the gradient of both.

    norm and norm_in: moments (2, C), weight and bias of the BatchNorm after and before the convolution; eps: of both. y and
    the moments get no gradient: what goes through them is part of the gradients of x, the weights and the biases. No Triton
    kernel is in here: see `batch_norm.apply_batch_norm`.
    """
    moments, gamma, beta = norm
    inv_std = per_channel(torch.rsqrt(moments[1] + eps[0]))
    z = (y.float() - per_channel(moments[0])) * (inv_std * per_channel(gamma)) + per_channel(beta)
    return activate(z, options[3]).to(y.dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, x, weight, norm, norm_in, ctx.eps, ctx.options = inputs
    ctx.save_for_backward(y, x, weight, *norm, *norm_in)


def _depthwise_norm_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    y, x, weight, *norms = ctx.saved_tensors
    norm, norm_in, eps, options = norms[:3], norms[3:], ctx.eps, ctx.options
    g, channels = to_channels_last(g), x.shape[1]
    sums = gradient_sums(g, y, *norm, eps[0], options[3])
    h, totals = depthwise_gradients([g, y, x], weight, [*norm, sums], norm_in, eps, options)
    filters = totals[: NUM_TAPS * channels].view(channels, 1, 3, 3)
    norm_gradients, norm_in_gradients = [None, sums[1], sums[0]], []
    if norm_in:
        sums_in, count = totals[NUM_TAPS * channels :].view(2, channels), x.numel() // channels
        _, x_hat, scale = _normalise(x, norm_in, eps[1])
        h = scale * (h.float() - per_channel(sums_in[0] / count) - x_hat * per_channel(sums_in[1] / count))
        norm_in_gradients = [None, sums_in[1], sums_in[0]]
    return None, h.to(x.dtype), filters, norm_gradients, norm_in_gradients, None, None


depthwise_norm.register_autograd(_depthwise_norm_backward, setup_context=_save_for_backward)
