"""3 x 3 convolution, bias, ReLU and 2 x 2 max-pooling as one operation.

As separate operations, a step of worksheet 1 writes and reads the large map of each convolution about eight times: bias and
ReLU, pooling, the gradients of both, the sums for the bias. Here that map is never in memory. The kernel keeps the largest
value of each 2 x 2 square and its `argmax`: which of the four pixels it was (0 to 3), or 4 where none is above zero. The
gradients of images, filters and bias are made from those.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cifar.kernels.triton.conv3x3 import (
    KERNEL_SIZE,
    MAX_IN_CHANNELS,
    MAX_OUT_CHANNELS,
    LaunchPlan,
    convolve_3x3_reference,
    correlate_3x3_reference,
    launch_kernel,
    rotate_filter,
    sum_partials,
)
from cifar.kernels.triton.conv_relu_pool_kernels import convolve_pool, convolve_pool_input_grad, convolve_pool_weight_grad
from cifar.kernels.triton.launch import (
    LaunchConfig,
    choose_num_programs,
    count_multiprocessors,
    empty_channels_last,
    round_up_to_tile,
    to_channels_last,
)
from cifar.kernels.triton.max_pool import max_pool_with_argmax, max_unpool_2x2
from cifar.kernels.triton.verify import KernelCase, RandomInputs, Verifier, is_close

NO_ARGMAX = 4  # of a square in which no value is above zero
FORWARD_CONFIGS = {  # by TAPS
    16: LaunchConfig(64, 4, 1, 4),
    32: LaunchConfig(64, 4, 1, 4),
    64: LaunchConfig(64, 4, 1, 4),
    128: LaunchConfig(64, 4, 1, 2),
}
WEIGHT_GRAD_CONFIGS = {  # by TAPS
    16: LaunchConfig(64, 4, 1, 2),
    32: LaunchConfig(64, 4, 2, 2),
    64: LaunchConfig(64, 4, 3, 1),
    128: LaunchConfig(64, 8, 1, 0.5),
}
INPUT_GRAD_CONFIGS = {  # by channels of the result, rounded up
    16: LaunchConfig(64, 4, 1, 2),
    32: LaunchConfig(64, 4, 1, 1),
    64: LaunchConfig(64, 4, 1, 1),
}


# -- each operator by Triton and by torch ------------------------------------------------------------------------------


def convolve_relu_pool_triton(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`convolve_relu_pool` by our kernel."""
    x, taps = to_channels_last(x), round_up_to_tile(KERNEL_SIZE * x.shape[1])
    y, argmax = _empty_pooled(x, weight)
    filters, strides = rotate_filter(weight, False)
    plan = LaunchPlan(convolve_pool, FORWARD_CONFIGS[taps], taps)
    launch_kernel(plan, x.shape, len(weight), (x, filters, bias, y, argmax), strides)
    return y, argmax


def convolve_relu_pool_input_grad_triton(g: Tensor, argmax: Tensor, weight: Tensor) -> Tensor:
    """`convolve_relu_pool_input_grad` by our kernel."""
    g, argmax, out_channels = to_channels_last(g), to_channels_last(argmax), weight.shape[1]
    full_shape = (len(g), g.shape[1], g.shape[2] * 2, g.shape[3] * 2)
    y = _empty_input_grad(g, weight)
    filters, strides = rotate_filter(weight, True)
    plan = LaunchPlan(
        convolve_pool_input_grad, INPUT_GRAD_CONFIGS[round_up_to_tile(out_channels)], round_up_to_tile(g.shape[1])
    )
    launch_kernel(plan, full_shape, out_channels, (g, argmax, filters, y), strides)
    return y


def convolve_relu_pool_weight_grad_triton(x: Tensor, g: Tensor, argmax: Tensor) -> Tensor:
    """`convolve_relu_pool_weight_grad` by our kernels: one makes each program's sum, another adds these."""
    x, g, argmax = to_channels_last(x), to_channels_last(g), to_channels_last(argmax)
    in_channels, out_channels = x.shape[1], g.shape[1]
    taps = round_up_to_tile(KERNEL_SIZE * in_channels)
    plan = LaunchPlan(convolve_pool_weight_grad, WEIGHT_GRAD_CONFIGS[taps], taps)
    num_programs = choose_num_programs(plan.config, plan.count_strips(x.shape), count_multiprocessors(x.device))
    partials = torch.empty((num_programs, out_channels * (9 * in_channels + 1)), dtype=torch.float32, device=x.device)
    launch_kernel(plan, x.shape, out_channels, (x, g, argmax, partials), num_programs=num_programs)
    return sum_partials(partials)


def convolve_relu_pool_reference(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`convolve_relu_pool` by torch."""
    full = convolve_3x3_reference(x, weight, False)
    full = full + bias.to(full.dtype)[:, None, None]
    y, argmax = max_pool_with_argmax(full.relu())
    argmax = torch.where(y == 0, NO_ARGMAX, argmax)
    return to_channels_last(y), to_channels_last(argmax.to(torch.int8))


def convolve_relu_pool_input_grad_reference(g: Tensor, argmax: Tensor, weight: Tensor) -> Tensor:
    """`convolve_relu_pool_input_grad` by torch."""
    return convolve_3x3_reference(max_unpool_2x2(g, argmax), weight, True)


def convolve_relu_pool_weight_grad_reference(x: Tensor, g: Tensor, argmax: Tensor) -> Tensor:
    """`convolve_relu_pool_weight_grad` by torch."""
    full = max_unpool_2x2(g, argmax)
    weight, bias = correlate_3x3_reference(x, full), full.sum((0, 2, 3), dtype=torch.float32)
    return torch.cat([weight.permute(0, 2, 3, 1).reshape(-1), bias])


def _empty_pooled(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Room for values and argmax."""
    y = empty_channels_last(x, (len(x), len(weight), x.shape[2] // 2, x.shape[3] // 2))
    return y, torch.empty_like(y, dtype=torch.int8)


def _empty_input_grad(g: Tensor, weight: Tensor) -> Tensor:
    return empty_channels_last(g, (len(g), weight.shape[1], g.shape[2] * 2, g.shape[3] * 2))


# -- which of the two --------------------------------------------------------------------------------------------------


def supports_pooled_shape(in_channels: int, out_channels: int, height: int, width: int) -> bool:
    """Whether our kernels are meant for such images."""
    return height % 4 == 0 and width % 2 == 0 and in_channels <= MAX_IN_CHANNELS and out_channels <= MAX_OUT_CHANNELS


def _supports_case(case: KernelCase) -> bool:
    return supports_pooled_shape(case.shape[1], case.out_channels, *case.shape[2:])


def _matches_reference(case: KernelCase, inputs: RandomInputs) -> bool:
    """With images and filters that lie in memory as those of the case do."""
    count, in_channels, height, width = case.shape
    pooled_shape = (count, case.out_channels, height // 2, width // 2)
    x, g = inputs.draw_images(*case.shape), inputs.draw_images(*pooled_shape)
    argmax = torch.randint(NO_ARGMAX + 1, pooled_shape, generator=inputs.generator, device=case.device, dtype=torch.int8)
    argmax = to_channels_last(argmax)
    if case.kernel == "weight_grad":
        expected = convolve_relu_pool_weight_grad_reference(x.float(), g.float(), argmax)
        return is_close(convolve_relu_pool_weight_grad_triton(x, g, argmax), expected)
    weight = inputs.draw_filters(case.out_channels, in_channels, KERNEL_SIZE, KERNEL_SIZE)
    if case.kernel == "input_grad":
        expected = convolve_relu_pool_input_grad_reference(g.float(), argmax, weight)
        return is_close(convolve_relu_pool_input_grad_triton(g, argmax, weight), expected)
    bias = inputs.draw_images(case.out_channels, 1, 1, 1).float().flatten()
    y, argmax = convolve_relu_pool_triton(x, weight, bias)
    expected, _ = convolve_relu_pool_reference(x.float(), weight, bias)
    full = convolve_3x3_reference(x.float(), weight, False) + bias[:, None, None]
    # where two values are nearly equal either may be the largest, so the value at the argmax has to be right
    ones = max_unpool_2x2(torch.ones_like(expected), argmax)
    return is_close(y, expected) and is_close(F.avg_pool2d(full * ones, 2) * 4, expected)


verifier = Verifier(_supports_case, _matches_reference)


# -- operators ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("cifar::convolve_relu_pool", mutates_args=())
def convolve_relu_pool(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """3 x 3 convolution (stride 1, zero padding of 1), bias, ReLU and 2 x 2 max-pooling.

    x (N, IN, H, W), weight (OUT, IN, 3, 3) and bias (OUT,) float32 -> values (N, OUT, H / 2, W / 2), and argmax of the same
    shape, int8: which of the four pixels of its square (0, 1; 2, 3) each value is, 4 where none is above zero.
    """
    use_triton = verifier.can_use("forward", x, len(weight), weight.stride())
    return (convolve_relu_pool_triton if use_triton else convolve_relu_pool_reference)(x, weight, bias)


@convolve_relu_pool.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_pooled(x, weight)


@torch.library.custom_op("cifar::convolve_relu_pool_images", mutates_args=())
def convolve_relu_pool_input_grad(g: Tensor, argmax: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x from that of the values (N, OUT, H / 2, W / 2) -> (N, IN, H, W), channels last."""
    shape = (len(g), weight.shape[1], g.shape[2] * 2, g.shape[3] * 2)
    use_triton = verifier.can_use("input_grad", g, len(weight), weight.stride(), shape)
    compute = convolve_relu_pool_input_grad_triton if use_triton else convolve_relu_pool_input_grad_reference
    return compute(g, argmax, weight)


@convolve_relu_pool_input_grad.register_fake
def _(g: Tensor, argmax: Tensor, weight: Tensor) -> Tensor:
    return _empty_input_grad(g, weight)


@torch.library.custom_op("cifar::convolve_relu_pool_filters", mutates_args=())
def convolve_relu_pool_weight_grad(x: Tensor, g: Tensor, argmax: Tensor) -> Tensor:
    """The gradients of weight, as (OUT, 3, 3, IN), and of bias, one after the other: (OUT * 9 * IN + OUT,) float32."""
    use_triton = verifier.can_use("weight_grad", x, g.shape[1])
    compute = convolve_relu_pool_weight_grad_triton if use_triton else convolve_relu_pool_weight_grad_reference
    return compute(x, g, argmax)


@convolve_relu_pool_weight_grad.register_fake
def _(x: Tensor, g: Tensor, argmax: Tensor) -> Tensor:
    return torch.empty(g.shape[1] * (9 * x.shape[1] + 1), dtype=torch.float32, device=x.device)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])


def _convolve_relu_pool_backward(ctx: Any, g: Tensor, _: None) -> tuple[Tensor | None, Tensor, Tensor]:
    x, weight, argmax = ctx.saved_tensors
    g = to_channels_last(g)  # here, where it becomes part of the kernel that makes g
    images = convolve_relu_pool_input_grad(g, argmax, weight) if ctx.needs_input_grad[0] else None
    gradients = convolve_relu_pool_weight_grad(x, g, argmax)
    out_channels, in_channels = weight.shape[:2]
    num_weights = out_channels * 9 * in_channels
    filters = gradients[:num_weights].view(out_channels, KERNEL_SIZE, KERNEL_SIZE, in_channels).permute(0, 3, 1, 2)
    return images, filters, gradients[num_weights:]


convolve_relu_pool.register_autograd(_convolve_relu_pool_backward, setup_context=_save_for_backward)
