"""BatchNorm of images in training, with the ReLU that follows it, for compiled steps on a GPU.

torch.compile makes its sums in two kernels, reads the result of the ReLU again for the gradient, and does not know that the
convolution has just had every value in its registers. Here the convolution sums up what it writes, and the gradient works out
again where the ReLU let something pass. What is left, one multiplication and one addition a value, stays for the compiler to
fuse.

Mean and variance are of the values as they are stored, like torch's. The sums are of x - pivot (Chan, Golub & LeVeque 1983,
"Algorithms for computing the sample variance"). The pivot is the running mean: once that is near the mean, nothing cancels
that matters. Before, the variance of values whose mean is 30 standard deviations from zero is wrong by 0.03 %.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from cifar.kernels.triton.batch_norm_kernels import add_moments, sum_gradients, sum_pixels
from cifar.kernels.triton.conv3x3 import (
    KERNEL_SIZE,
    choose_conv_programs,
    convolve_3x3,
    convolve_3x3_reference,
    convolve_3x3_sums_triton,
    correlate_3x3,
    sum_partials,
    supports_shape,
)
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

MAX_BN_CHANNELS = 64  # for more it is not known to be worth it
# `block` here: pixels of a block times their channels, rounded up
PIXEL_SUMS_CONFIG = LaunchConfig(4096, 2, 1, 4)
GRADIENT_SUMS_CONFIGS = {True: LaunchConfig(4096, 2, 1, 4), False: LaunchConfig(8192, 8, 1, 2)}  # with and without a ReLU
STATISTICS_TILE = 128, 4  # rows that are added at once, and columns of a program


# -- each operator by Triton and by torch ------------------------------------------------------------------------------


def _plan_sums(shape: Shape, config: LaunchConfig, num_multiprocessors: int) -> tuple[int, int, int]:
    """Number of pixels, pixels of a block, and how many programs are quickest."""
    count, channels, height, width = shape
    num_pixels, block = count * height * width, config.block // round_up_to_tile(channels)
    return num_pixels, block, choose_num_programs(config._replace(block=block), num_pixels, num_multiprocessors)


def choose_sum_programs(shape: Shape, num_multiprocessors: int) -> int:
    """How many programs are quickest for `pixel_sums`."""
    return _plan_sums(shape, PIXEL_SUMS_CONFIG, num_multiprocessors)[2]


def pixel_sums_triton(x: Tensor, pivot: Tensor, num_programs: int) -> Tensor:
    """`pixel_sums` by our kernel."""
    x, config = to_channels_last(x), PIXEL_SUMS_CONFIG
    num_pixels, block, _ = _plan_sums(x.shape, config, 1)
    partials = x.new_empty((num_programs, 2, x.shape[1]), dtype=torch.float32)
    with torch.cuda.device_of(x):
        sum_pixels[(num_programs,)](
            x, pivot, partials, num_pixels, num_programs,
            x.shape[1], round_up_to_tile(x.shape[1]), block, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return partials


def update_statistics_triton(
    partials: Tensor, running_mean: Tensor, running_variance: Tensor, batches: Tensor, pixels: int, momentum: float
) -> Tensor:
    """`update_statistics` by our kernel."""
    num_programs, _, size = partials.shape
    moments = partials.new_empty((2, size))
    with torch.cuda.device_of(partials):
        add_moments[(triton.cdiv(size, STATISTICS_TILE[1]),)](
            partials, running_mean, running_variance, batches, moments,
            pixels, num_programs, momentum, pixels / max(pixels - 1, 1), size, *STATISTICS_TILE, num_warps=4,
        )  # fmt: skip
    return moments


def gradient_sums_triton(g: Tensor, x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool) -> Tensor:
    """`gradient_sums` by our kernels."""
    g, x, config = to_channels_last(g), to_channels_last(x), GRADIENT_SUMS_CONFIGS[relu]
    num_pixels, block, num_programs = _plan_sums(x.shape, config, count_multiprocessors(x.device))
    partials = x.new_empty((num_programs, 2, x.shape[1]), dtype=torch.float32)
    with torch.cuda.device_of(x):
        sum_gradients[(num_programs,)](
            g, x, moments, weight, bias, partials, num_pixels, num_programs, eps,
            relu, x.shape[1], round_up_to_tile(x.shape[1]), block, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return sum_partials(partials.flatten(1)).view(2, x.shape[1])


def pixel_sums_reference(x: Tensor, pivot: Tensor, num_programs: int) -> Tensor:
    """`pixel_sums` by torch: all of them in the place of the first program."""
    x_centered = x.float() - per_channel(_finite_or_zero(pivot))
    sums = torch.stack([x_centered.sum((0, 2, 3)), x_centered.square().sum((0, 2, 3))])
    return torch.cat([sums[None], sums.new_zeros((num_programs - 1, *sums.shape))])


def update_statistics_reference(
    partials: Tensor, running_mean: Tensor, running_variance: Tensor, batches: Tensor, pixels: int, momentum: float
) -> Tensor:
    """`update_statistics` by torch."""
    first, second = partials.sum(0) / pixels  # moments about the pivot
    moments = torch.stack([_finite_or_zero(running_mean) + first, (second - first.square()).clamp_min(0)])
    running_mean.lerp_(moments[0], momentum)
    running_variance.lerp_(moments[1] * (pixels / max(pixels - 1, 1)), momentum)
    batches.add_(1)
    return moments


def gradient_sums_reference(
    g: Tensor, x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool
) -> Tensor:
    """`gradient_sums` by torch."""
    g, x_centered, inv_std = _gradient_terms(g, x, moments, weight, bias, eps, relu)
    return torch.stack([g.sum((0, 2, 3)), (g * x_centered * inv_std).sum((0, 2, 3))])


def per_channel(value: Tensor) -> Tensor:
    """(C,) -> (C, 1, 1), to compute with images."""
    return value[:, None, None]


def _finite_or_zero(pivot: Tensor) -> Tensor:
    return torch.where(pivot.isfinite(), pivot, 0.0)


def _gradient_terms(
    g: Tensor, x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient before the ReLU (N, C, H, W), x - mean, and 1 / standard deviation (C, 1, 1); all float32."""
    mean, var = moments[0], moments[1]
    x_centered, inv_std = x.float() - per_channel(mean), per_channel(torch.rsqrt(var + eps))
    g = g.float()
    if relu:
        g = torch.where(x_centered * (inv_std * per_channel(weight)) + per_channel(bias) > 0, g, 0.0)
    return g, x_centered, inv_std


# -- which of the two --------------------------------------------------------------------------------------------------


def _supports_case(case: KernelCase) -> bool:
    if case.kernel == "convolve" and not supports_shape(case.shape[1], case.out_channels, *case.shape[2:]):
        return False
    return case.out_channels <= MAX_BN_CHANNELS


def _matches_reference(case: KernelCase, inputs: RandomInputs) -> bool:
    if case.kernel == "statistics":
        return _matches_statistics(case, inputs)
    draw, (count, channels), out_channels = inputs.draw_normal, case.shape[:2], case.out_channels
    # every channel and every image has a mean of its own, so that it matters which values are summed
    x = draw(*case.shape) * (1 + draw(channels, 1, 1).abs()) + 0.1 * draw(count, channels, 1, 1)
    if case.kernel == "gradients":
        x = to_channels_last(x.to(case.dtype))
        g = to_channels_last((draw(*case.shape) + 0.1 * draw(count, channels, 1, 1)).to(case.dtype))
        moments = torch.stack([draw(out_channels), draw(out_channels).square() + 0.1])
        given = g, x, moments, draw(out_channels), draw(out_channels), *case.options
        return all(map(is_close, gradient_sums_triton(*given), gradient_sums_reference(*given)))
    num_multiprocessors = count_multiprocessors(case.device)
    if case.kernel == "pixels":
        mean = draw(out_channels)
        y, pivot = to_channels_last((x + per_channel(mean)).to(case.dtype)), mean + 0.05 * draw(out_channels)
        partials = pixel_sums_triton(y, pivot, choose_sum_programs(y.shape, num_multiprocessors))
    else:
        x = to_channels_last(x.to(case.dtype))
        weight = inputs.draw_filters(out_channels, channels, KERNEL_SIZE, KERNEL_SIZE)
        expected = convolve_3x3_reference(x.float(), weight, False)
        pivot = expected.mean((0, 2, 3)) + 0.05 * draw(out_channels) * expected.std((0, 2, 3))
        num_programs = choose_conv_programs(x.shape, out_channels, num_multiprocessors)
        y, partials = convolve_3x3_sums_triton(x, weight, pivot, num_programs)
        if not is_close(y, expected):
            return False
    return all(map(is_close, partials.sum(0), pixel_sums_reference(y, pivot, 1).sum(0)))


def _matches_statistics(case: KernelCase, inputs: RandomInputs) -> bool:
    num_programs, _, size = case.shape
    partials = inputs.draw_normal(*case.shape)
    partials += torch.tensor([1.0, 9.0], device=case.device)[:, None] + 0.1 * torch.arange(size, device=case.device)
    mean, variance = torch.rand((2, size), generator=inputs.generator, device=case.device)
    results = []
    for compute in (update_statistics_triton, update_statistics_reference):
        running = mean.clone(), variance.clone(), torch.full((), 7, device=case.device)
        moments = compute(partials, *running, 2 * num_programs, 0.5)
        results.append([*moments, running[0] - mean, running[1] - variance, running[2].float()])
    return all(map(is_close, *results))


verifier = Verifier(_supports_case, _matches_reference)


def make_statistics_case(partials: Tensor) -> KernelCase:
    """What `update_statistics` of these sums is verified as."""
    return KernelCase("statistics", tuple(partials.shape), partials.shape[2], (), torch.float32, partials.device)


# -- operators ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("cifar::pixel_sums", mutates_args=())
def pixel_sums(x: Tensor, pivot: Tensor, num_programs: int) -> Tensor:
    """Sums of x - pivot and of its square, each program's of some pixels.

    x (N, C, H, W), pivot (C,) float32 -> (num_programs, 2, C) float32.
    """
    use_triton = verifier.can_use("pixels", x, x.shape[1])
    return (pixel_sums_triton if use_triton else pixel_sums_reference)(x, pivot, num_programs)


@pixel_sums.register_fake
def _(x: Tensor, pivot: Tensor, num_programs: int) -> Tensor:
    return torch.empty((num_programs, 2, x.shape[1]), dtype=torch.float32, device=x.device)


@torch.library.custom_op("cifar::convolve_3x3_sums", mutates_args=())
def convolve_3x3_sums(x: Tensor, weight: Tensor, pivot: Tensor, num_programs: int) -> tuple[Tensor, Tensor]:
    """`convolve_3x3`, and the `pixel_sums` of its result. The sums have no gradient: that is part of `apply_batch_norm`'s."""
    if verifier.can_use("convolve", x, len(weight), weight.stride()):
        return convolve_3x3_sums_triton(x, weight, pivot, num_programs)
    y = convolve_3x3(x, weight, False)
    return y, pixel_sums_reference(y, pivot, num_programs)


@convolve_3x3_sums.register_fake
def _(x: Tensor, weight: Tensor, pivot: Tensor, num_programs: int) -> tuple[Tensor, Tensor]:
    y = empty_channels_last(x, (x.shape[0], weight.shape[0], *x.shape[2:]))
    return y, torch.empty((num_programs, 2, weight.shape[0]), dtype=torch.float32, device=x.device)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2])


def _convolve_sums_backward(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, weight = ctx.saved_tensors
    images = convolve_3x3(g, weight, True) if ctx.needs_input_grad[0] else None
    return images, correlate_3x3(x, g) if ctx.needs_input_grad[1] else None, None, None


convolve_3x3_sums.register_autograd(_convolve_sums_backward, setup_context=_save_for_backward)


@torch.library.custom_op("cifar::statistics", mutates_args=("running_mean", "running_variance", "batches"))
def update_statistics(
    partials: Tensor, running_mean: Tensor, running_variance: Tensor, batches: Tensor, pixels: int, momentum: float
) -> Tensor:
    """Mean and (biased) variance of so many pixels, (2, C) float32, from their sums with running_mean as the pivot.

    As torch does, it also updates BatchNorm's running statistics (C,) and the number of batches that they are from.
    """
    use_triton = verifier.is_verified(make_statistics_case(partials))
    compute = update_statistics_triton if use_triton else update_statistics_reference
    return compute(partials, running_mean, running_variance, batches, pixels, momentum)


@update_statistics.register_fake
def _(
    partials: Tensor, running_mean: Tensor, running_variance: Tensor, batches: Tensor, pixels: int, momentum: float
) -> Tensor:
    return torch.empty(partials.shape[1:], dtype=torch.float32, device=partials.device)


@torch.library.custom_op("cifar::gradient_sums", mutates_args=())
def gradient_sums(g: Tensor, x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool) -> Tensor:
    """Sums over each channel of g and of g * (x - mean) / deviation, (2, C): the gradients of BatchNorm's bias and weight.

    `relu`: only where the result of BatchNorm is above zero.
    """
    use_triton = verifier.can_use("gradients", x, x.shape[1], (eps, relu))
    return (gradient_sums_triton if use_triton else gradient_sums_reference)(g, x, moments, weight, bias, eps, relu)


@gradient_sums.register_fake
def _(g: Tensor, x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool) -> Tensor:
    return torch.empty((2, x.shape[1]), dtype=torch.float32, device=x.device)


@torch.library.triton_op("cifar::normalised", mutates_args=())
def apply_batch_norm(x: Tensor, moments: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool) -> Tensor:
    """(x - mean) / standard deviation * weight + bias for x (N, C, H, W), in the precision of x; `relu`: followed by a ReLU.

    moments (2, C): mean and variance of x. The gradient of x includes what comes through the moments. No Triton kernel is in
    here. It is a "triton_op" because a compiler looks into those, but not into other operators with a gradient of their own.
    """
    inv_std = per_channel(torch.rsqrt(moments[1] + eps))
    y = (x.float() - per_channel(moments[0])) * (inv_std * per_channel(weight)) + per_channel(bias)
    return (y.relu() if relu else y).to(x.dtype)


def _save_all_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.eps, ctx.relu = inputs[4:]


def _batch_norm_backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None, None]:
    x, moments, weight, bias = ctx.saved_tensors
    g, count = to_channels_last(g), x.numel() // x.shape[1]
    sums = gradient_sums(g, x, moments, weight, bias, ctx.eps, ctx.relu)
    g, x_centered, inv_std = _gradient_terms(g, x, moments, weight, bias, ctx.eps, ctx.relu)
    scale = inv_std * per_channel(weight)
    images = scale * (g - per_channel(sums[0] / count) - x_centered * inv_std * per_channel(sums[1] / count))
    return images.to(x.dtype), None, sums[1], sums[0], None, None


apply_batch_norm.register_autograd(_batch_norm_backward, setup_context=_save_all_for_backward)
