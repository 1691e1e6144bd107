"""Which modules of a network use the Triton kernels, in training and in evaluation.

A module gets another class, and keeps its weights and its name: the keys of a `state_dict` stay, and so does what is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cifar.kernels.triton.batch_norm import (
    MAX_BN_CHANNELS,
    NO_ACTIVATION,
    RELU,
    RELU6,
    apply_batch_norm,
    choose_sum_programs,
    convolve_3x3_sums,
    pixel_sums,
    update_statistics,
)
from cifar.kernels.triton.conv3x3 import KERNEL_SIZE, choose_conv_programs, convolve_3x3, supports_shape
from cifar.kernels.triton.conv_relu_pool import convolve_relu_pool, supports_pooled_shape
from cifar.kernels.triton.depthwise import (
    DepthwiseOptions,
    choose_depthwise_programs,
    depthwise_norm,
    depthwise_sums,
    is_matmul_quicker,
    is_worthwhile,
)
from cifar.kernels.triton.launch import count_multiprocessors, to_channels_last
from cifar.kernels.triton.max_pool import MIN_POOL_CHANNELS, max_pool_2x2, supports_channels

ACTIVATIONS = {nn.ReLU: RELU, nn.ReLU6: RELU6}
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


class MatmulConv2d(nn.Conv2d):
    """The same 1 x 1 convolution as one matrix product, where the kernels are enabled."""

    def forward(self, x: Tensor) -> Tensor:
        if not are_kernels_enabled(x):
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class FusedConvNorm(nn.Sequential):
    """The same convolution, BatchNorm and, if there is one, ReLU; in training by Triton kernels where those are enabled."""

    num_multiprocessors: int  # of the GPU: how many sums are made is a constant of compiled code, which other processes use too
    activation_code: int  # as `apply_batch_norm` takes it

    @property
    def batch_norm(self) -> nn.BatchNorm2d:
        norm = self[1]
        assert isinstance(norm, nn.BatchNorm2d)
        return norm

    def can_fuse(self, x: Tensor) -> bool:
        """Whether the kernels are to be used now."""
        norm = self.batch_norm
        updates_statistics = norm.training and norm.track_running_stats and norm.momentum is not None
        has_statistics = norm.running_mean is not None and norm.running_var is not None
        return are_kernels_enabled(x) and updates_statistics and has_statistics and not any(_has_hooks(child) for child in self)

    def convolve(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What comes out of the convolution, and its moments (2, C)."""
        conv, mean = self[0], self.batch_norm.running_mean
        assert mean is not None
        if type(conv) is TritonConv2d:
            num_programs = choose_conv_programs(x.shape, conv.out_channels, self.num_multiprocessors)
            y, partials = convolve_3x3_sums(x.to(TritonConv2d.precision), conv.weight, mean, num_programs)
        else:
            y = conv(x)
            partials = pixel_sums(y.detach(), mean, choose_sum_programs(y.shape, self.num_multiprocessors))
        return y, self.update_statistics(partials, y)

    def update_statistics(self, partials: Tensor, y: Tensor) -> Tensor:
        """The moments of y (N, C, H, W) from its `pixel_sums`. The running statistics move, too."""
        norm = self.batch_norm
        mean, variance, batches, momentum = norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum
        assert mean is not None and variance is not None and batches is not None and momentum is not None
        moments: Tensor = update_statistics(partials.detach(), mean, variance, batches, y.numel() // y.shape[1], momentum)
        return moments

    def forward(self, x: Tensor) -> Tensor:
        if not self.can_fuse(x):
            return super().forward(x)  # type: ignore[no-untyped-call]
        norm = self.batch_norm
        y, moments = self.convolve(x)
        z: Tensor = apply_batch_norm(y, moments, norm.weight, norm.bias, norm.eps, self.activation_code)
        return z


class FusedDepthwise(FusedConvNorm):
    """A depthwise convolution and its BatchNorm, which also do the work of the row before them."""

    before: tuple[FusedConvNorm, ...]  # that row or none; in a tuple, so that it is no child of this module
    options: list[int]  # the values of `DepthwiseOptions`

    def forward(self, x: Tensor) -> Tensor:
        if not all(row.can_fuse(x) for row in (self, *self.before)):
            return super().forward(x)
        conv, norm, mean = self[0], self.batch_norm, self.batch_norm.running_mean
        assert isinstance(conv, nn.Conv2d) and mean is not None
        norm_in, eps_in, options = [], norm.eps, self.options
        if self.before:
            norm_before = self.before[0].batch_norm
            x, moments = self.before[0].convolve(x)
            norm_in, eps_in = [moments, norm_before.weight, norm_before.bias], norm_before.eps
        x = x.to(TritonConv2d.precision)
        num_programs = choose_depthwise_programs(conv.out_channels, self.num_multiprocessors)
        fixed = [value.detach() for value in norm_in]
        y, partials = depthwise_sums(x.detach(), conv.weight.detach(), mean, fixed, eps_in, options, num_programs)
        norm_out = [self.update_statistics(partials, y), norm.weight, norm.bias]
        z: Tensor = depthwise_norm(y, x, conv.weight, norm_out, norm_in, [norm.eps, eps_in], options)
        return z


class FusedAwayConvNorm(FusedConvNorm):
    """Does nothing where the depthwise convolution after it does its work."""

    follower: tuple[FusedDepthwise]

    def forward(self, x: Tensor) -> Tensor:
        return x if self.can_fuse(x) and self.follower[0].can_fuse(x) else super().forward(x)


@torch.no_grad()
def fuse_model(model: nn.Module, images: Tensor, batch_size: int = 1) -> int:
    """Let the modules that the kernels are meant for use them -> how many convolutions do. Weights and names stay.

    images (1, 3, H, W), with any content: from a forward pass it is known how large the images of each module are, and which
    module's output goes where. `batch_size`: of the training, for which some kernels are compared with torch's by time.
    """
    calls, num_uses = _record_calls(model, images)
    convolutions = [module for module in calls if isinstance(module, nn.Conv2d)]
    has_depthwise = any(_is_depthwise(conv) for conv in convolutions)
    num_fused = 0
    for conv in convolutions:
        if type(conv) is nn.Conv2d and _supports_conv(conv, [x for x, _ in calls[conv]]):
            conv.__class__ = TritonConv2d
            num_fused += 1
    if has_depthwise:
        for conv in convolutions:
            if type(conv) is nn.Conv2d and _is_quicker_as_matmul(conv, [x for x, _ in calls[conv]], batch_size):
                conv.__class__ = MatmulConv2d
    for parent in calls:
        if isinstance(parent, nn.Sequential):
            _fuse_rows(parent, calls, images.device, has_depthwise)
    for parent in calls:
        if type(parent) is FusedConvNorm and _fuse_depthwise(parent, calls, num_uses, batch_size):
            num_fused += 1
    outputs = [y for conv in convolutions for _, y in calls[conv]]
    for module, seen in calls.items():  # behind a ReLU or BatchNorm it would split what a compiler makes one kernel of
        is_wide = all(x.dim() == 4 and x.shape[1] >= MIN_POOL_CHANNELS for x, _ in seen)
        if is_wide and _is_max_pool_2x2(module) and all(any(x is y for y in outputs) for x, _ in seen):
            module.__class__ = TritonMaxPool2d
    return num_fused


class _CountUses(TorchFunctionMode):
    """How often each tensor is given to a function of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[int, int] = {}  # by id
        self.kept: list[Tensor] = []  # so that no id is used twice

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self.counts[id(value)] = self.counts.get(id(value), 0) + 1
                self.kept.append(value)
        return function(*args, **(kwargs or {}))


def _record_calls(model: nn.Module, images: Tensor) -> tuple[Calls, Mapping[int, int]]:
    """Inputs and outputs in a forward pass in evaluation mode, of modules that may be fused, in the order of first calls.

    And how often each tensor, by its id, was given to a function.
    """
    calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}  # tensors are kept, so that `is` can tell which are the same

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs:
            calls.setdefault(module, []).append((inputs[0], output))

    uses = _CountUses()
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.MaxPool2d, nn.Sequential)
    watched = [module for module in model.modules() if type(module) in kinds and not _has_hooks(module)]
    hooks, was_training = [module.register_forward_hook(record) for module in watched], model.training
    try:
        with uses:
            model.eval()(images)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return calls, uses.counts


def _fuse_rows(parent: nn.Sequential, calls: Calls, device: torch.device, is_wide: bool) -> None:
    """Fuse convolution and BatchNorm if they are all that `parent` holds; and its rows of convolution, ReLU and pooling."""
    children = list(parent)
    if _is_conv_norm(children, is_wide) and all(child in calls for child in children):
        parent.__class__ = FusedConvNorm
        parent.num_multiprocessors = count_multiprocessors(device)  # type: ignore[assignment]
        parent.activation_code = ACTIVATIONS[type(children[2])] if len(children) == 3 else NO_ACTIVATION  # type: ignore[assignment]
    for row in zip(children, children[1:], children[2:], strict=False):
        conv, relu, pool = row
        if type(conv) is not TritonConv2d or conv.bias is None or type(relu) is not nn.ReLU or not _is_max_pool_2x2(pool):
            continue
        if not _is_private_chain(parent, row, calls):
            continue
        if supports_pooled_shape(conv.in_channels, conv.out_channels, *calls[conv][0][0].shape[2:]):
            conv.__class__, relu.__class__, pool.__class__ = FusedConvReLUPool, FusedAwayReLU, FusedAwayPool


def _fuse_depthwise(row: FusedConvNorm, calls: Calls, num_uses: Mapping[int, int], batch_size: int) -> bool:
    """Have a depthwise convolution do its BatchNorm, and that of the row before it, whose result nobody else may see."""
    conv, norm = row[0], row.batch_norm
    if not isinstance(conv, nn.Conv2d) or not _is_depthwise(conv) or any(len(calls[child]) != 1 for child in row):
        return False
    x = calls[conv][0][0]
    if x.dim() != 4 or not all(value.requires_grad for value in (conv.weight, norm.weight, norm.bias)):
        return False
    before = [other for other in calls if type(other) is FusedConvNorm and calls[other][-1][1] is x and other is not row]
    is_seen_once = all(len(calls[part]) == 1 for other in before for part in (other, *other))
    if len(before) > 1 or num_uses.get(id(x)) != 1 or not is_seen_once:
        before = []
    activation_in = before[0].activation_code if before else NO_ACTIVATION
    options = DepthwiseOptions(conv.stride[0], int(bool(before)), activation_in, row.activation_code)
    if not is_worthwhile((batch_size, *x.shape[1:]), TritonConv2d.precision, x.device, options):
        return False
    row.__class__ = FusedDepthwise
    row.before, row.options = tuple(before), list(options)  # type: ignore[assignment]
    for other in before:
        other.__class__ = FusedAwayConvNorm
        other.follower = (row,)  # type: ignore[assignment]
    return True


def _is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether this is a 3 x 3 convolution of each channel by itself that our kernels are meant for."""
    is_grouped = conv.groups == conv.in_channels == conv.out_channels > 1 and conv.bias is None
    is_padded = conv.padding_mode == "zeros" and conv.padding == (1, 1) and conv.dilation == (1, 1)
    return is_grouped and is_padded and conv.kernel_size == (KERNEL_SIZE, KERNEL_SIZE) and conv.stride in ((1, 1), (2, 2))


def _is_quicker_as_matmul(conv: nn.Conv2d, images: Sequence[Tensor], batch_size: int) -> bool:
    """Whether this is a 1 x 1 convolution that a matrix product does in less time on this GPU."""
    is_1x1 = conv.kernel_size == conv.stride == (1, 1) and conv.padding in ((0, 0), "valid") and conv.groups == 1
    if not is_1x1 or len(images) != 1 or images[0].dim() != 4:
        return False
    x = images[0]
    return is_matmul_quicker((batch_size, *x.shape[1:]), conv.out_channels, TritonConv2d.precision, x.device)


def _is_private_chain(parent: nn.Module, row: Sequence[nn.Module], calls: Calls) -> bool:
    """Whether each module was called once, by the parent, with the output of the one before: nobody else sees that output."""
    if any(len(calls.get(module, ())) != 1 for module in (parent, *row)):
        return False
    return all(calls[a][0][1] is calls[b][0][0] for a, b in itertools.pairwise(row))


def _has_hooks(module: nn.Module) -> bool:
    """Whether hooks are registered that see its inputs or outputs."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(len(registered) > 0 for registered in hooks)


def _is_conv_norm(row: Sequence[nn.Module], is_wide: bool) -> bool:
    """Whether these are a convolution without a bias, an ordinary BatchNorm of few channels, and at most a ReLU.

    `is_wide`: of any number of channels, and a ReLU6 may follow.
    """
    if not 2 <= len(row) <= 3 or (len(row) == 3 and type(row[2]) not in ACTIVATIONS):
        return False
    if not is_wide and len(row) == 3 and type(row[2]) is not nn.ReLU:
        return False
    conv, norm = row[:2]
    if type(norm) is not nn.BatchNorm2d or not isinstance(conv, nn.Conv2d) or conv.bias is not None:
        return False
    has_statistics = norm.affine and norm.running_mean is not None and norm.momentum is not None
    return has_statistics and (is_wide or norm.num_features <= MAX_BN_CHANNELS)


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
