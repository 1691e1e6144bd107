"""Which modules of a network use the Triton kernels, in training and in evaluation.

A module gets another class, and keeps its weights and its name: the keys of a `state_dict` stay, and so does what is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cifar.kernels.triton.batch_norm import (
    MAX_BN_CHANNELS,
    apply_batch_norm,
    choose_sum_programs,
    convolve_3x3_sums,
    pixel_sums,
    update_statistics,
)
from cifar.kernels.triton.conv3x3 import KERNEL_SIZE, choose_conv_programs, convolve_3x3, supports_shape
from cifar.kernels.triton.conv_relu_pool import convolve_relu_pool, supports_pooled_shape
from cifar.kernels.triton.launch import count_multiprocessors, to_channels_last
from cifar.kernels.triton.max_pool import MIN_POOL_CHANNELS, max_pool_2x2, supports_channels

Calls = Mapping[nn.Module, Sequence[tuple[Tensor, Tensor]]]  # a module -> input and output of each of its calls


def are_kernels_enabled(x: Tensor) -> bool:
    """Whether the kernels are to be used now: only under autocast."""
    return TritonConv2d.precision == torch.float32 or torch.is_autocast_enabled(x.device.type)


class TritonConv2d(nn.Conv2d):
    """The same convolution, by a Triton kernel where those are enabled."""

    precision = torch.bfloat16  # the one of autocast in cifar.training.step

    def forward(self, x: Tensor) -> Tensor:
        if not are_kernels_enabled(x):
            return super().forward(x)
        y: Tensor = convolve_3x3(x.to(self.precision), self.weight, False)
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]


class FusedConvReLUPool(TritonConv2d):
    """A convolution that also does the work of the ReLU and of the pooling after it."""

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None or not are_kernels_enabled(x):
            return super().forward(x)
        y: Tensor = convolve_relu_pool(x.to(self.precision), self.weight, self.bias)[0]
        return y


class FusedAwayReLU(nn.ReLU):
    """Does nothing where the convolution before has done it."""

    def forward(self, x: Tensor) -> Tensor:
        return x if are_kernels_enabled(x) else super().forward(x)


class FusedAwayPool(nn.MaxPool2d):
    """Does nothing where the convolution before has done it."""

    def forward(self, x: Tensor) -> Tensor:
        return x if are_kernels_enabled(x) else super().forward(x)


class TritonMaxPool2d(nn.MaxPool2d):
    """The same 2 x 2 max-pooling, by a Triton kernel where those are enabled."""

    def forward(self, x: Tensor) -> Tensor:
        is_supported = x.dtype == TritonConv2d.precision and x.dim() == 4 and supports_channels(x.shape[1])
        use_triton = are_kernels_enabled(x) and is_supported
        y: Tensor = max_pool_2x2(to_channels_last(x))[0] if use_triton else super().forward(x)
        return y


class FusedConvNorm(nn.Sequential):
    """The same convolution, BatchNorm and, if there is one, ReLU; in training by Triton kernels where those are enabled."""

    num_multiprocessors: int  # of the GPU: how many sums are made is a constant of compiled code, which other processes use too

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self[0], self[1]
        assert isinstance(norm, nn.BatchNorm2d)
        mean, variance, batches, momentum = norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum
        updates_statistics = norm.training and norm.track_running_stats and momentum is not None
        if (
            not (are_kernels_enabled(x) and updates_statistics)
            or mean is None
            or variance is None
            or batches is None
            or any(_has_hooks(module) for module in self)
        ):
            return super().forward(x)  # type: ignore[no-untyped-call]
        if type(conv) is TritonConv2d:
            num_programs = choose_conv_programs(x.shape, conv.out_channels, self.num_multiprocessors)
            y, partials = convolve_3x3_sums(x.to(TritonConv2d.precision), conv.weight, mean, num_programs)
        else:
            y = conv(x)
            partials = pixel_sums(y.detach(), mean, choose_sum_programs(y.shape, self.num_multiprocessors))
        moments = update_statistics(partials.detach(), mean, variance, batches, y.numel() // y.shape[1], momentum)
        z: Tensor = apply_batch_norm(y, moments, norm.weight, norm.bias, norm.eps, len(self) == 3)
        return z


@torch.no_grad()
def fuse_model(model: nn.Module, images: Tensor) -> int:
    """Let the modules that the kernels are meant for use them -> how many convolutions do. Weights and names stay.

    images (1, 3, H, W), with any content: from a forward pass it is known how large the images of each module are, and which
    module's output goes where.
    """
    calls = _record_calls(model, images)
    convolutions = [module for module in calls if isinstance(module, nn.Conv2d)]
    num_fused = 0
    for conv in convolutions:
        if type(conv) is nn.Conv2d and _supports_conv(conv, [x for x, _ in calls[conv]]):
            conv.__class__ = TritonConv2d
            num_fused += 1
    for parent in calls:
        if isinstance(parent, nn.Sequential):
            _fuse_rows(parent, calls, images.device)
    outputs = [y for conv in convolutions for _, y in calls[conv]]
    for module, seen in calls.items():  # behind a ReLU or BatchNorm it would split what a compiler makes one kernel of
        is_wide = all(x.dim() == 4 and x.shape[1] >= MIN_POOL_CHANNELS for x, _ in seen)
        if is_wide and _is_max_pool_2x2(module) and all(any(x is y for y in outputs) for x, _ in seen):
            module.__class__ = TritonMaxPool2d
    return num_fused


def _record_calls(model: nn.Module, images: Tensor) -> Calls:
    """Inputs and outputs in a forward pass in evaluation mode, of modules that may be fused, in the order of first calls."""
    calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}  # tensors are kept, so that `is` can tell which are the same

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs:
            calls.setdefault(module, []).append((inputs[0], output))

    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.Sequential)
    watched = [module for module in model.modules() if type(module) in kinds and not _has_hooks(module)]
    hooks, was_training = [module.register_forward_hook(record) for module in watched], model.training
    try:
        model.eval()(images)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return calls


def _fuse_rows(parent: nn.Sequential, calls: Calls, device: torch.device) -> None:
    """Fuse convolution and BatchNorm if they are all that `parent` holds; and its rows of convolution, ReLU and pooling."""
    children = list(parent)
    if _is_conv_norm(children) and all(child in calls for child in children):
        parent.__class__ = FusedConvNorm
        parent.num_multiprocessors = count_multiprocessors(device)  # type: ignore[assignment]
    for row in zip(children, children[1:], children[2:], strict=False):
        conv, relu, pool = row
        if type(conv) is not TritonConv2d or conv.bias is None or type(relu) is not nn.ReLU or not _is_max_pool_2x2(pool):
            continue
        if not _is_private_chain(parent, row, calls):
            continue
        if supports_pooled_shape(conv.in_channels, conv.out_channels, *calls[conv][0][0].shape[2:]):
            conv.__class__, relu.__class__, pool.__class__ = FusedConvReLUPool, FusedAwayReLU, FusedAwayPool


def _is_private_chain(parent: nn.Module, row: Sequence[nn.Module], calls: Calls) -> bool:
    """Whether each module was called once, by the parent, with the output of the one before: nobody else sees that output."""
    if any(len(calls.get(module, ())) != 1 for module in (parent, *row)):
        return False
    return all(calls[a][0][1] is calls[b][0][0] for a, b in itertools.pairwise(row))


def _has_hooks(module: nn.Module) -> bool:
    """Whether hooks are registered that see its inputs or outputs."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(len(registered) > 0 for registered in hooks)


def _is_conv_norm(row: Sequence[nn.Module]) -> bool:
    """Whether these are a convolution without a bias, an ordinary BatchNorm of few channels, and at most a ReLU."""
    if not 2 <= len(row) <= 3 or (len(row) == 3 and type(row[2]) is not nn.ReLU):
        return False
    conv, norm = row[:2]
    if type(norm) is not nn.BatchNorm2d or not isinstance(conv, nn.Conv2d) or conv.bias is not None:
        return False
    has_statistics = norm.affine and norm.running_mean is not None and norm.momentum is not None
    return has_statistics and norm.num_features <= MAX_BN_CHANNELS


def _supports_conv(module: nn.Conv2d, images: Sequence[Tensor]) -> bool:
    """Whether our kernels are meant for this convolution of such images."""
    if any(x.dim() != 4 or not supports_shape(module.in_channels, module.out_channels, *x.shape[2:]) for x in images):
        return False
    is_padded = module.groups == 1 and module.padding_mode == "zeros" and module.padding in ((1, 1), "same")
    is_3x3 = module.kernel_size == (KERNEL_SIZE, KERNEL_SIZE) and module.stride == module.dilation == (1, 1)
    return is_padded and is_3x3 and module.weight.requires_grad and (module.bias is None or module.bias.requires_grad)


def _is_max_pool_2x2(pool: nn.Module) -> bool:
    """Whether a module is 2 x 2 max-pooling and nothing else."""
    if type(pool) is not nn.MaxPool2d or pool.return_indices or pool.ceil_mode:
        return False
    pairs = ((pool.kernel_size, 2), (pool.stride, 2), (pool.padding, 0), (pool.dilation, 1))
    return all(value in (expected, (expected, expected)) for value, expected in pairs)
