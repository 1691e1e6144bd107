"""Which modules of a network use the kernels, in training and in evaluation. Weights, names and what is computed stay."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cifar.kernels.triton.batch_norm import MOST, convolve_sums, normalised, pixel_sums, statistics, summing
from cifar.kernels.triton.conv3x3 import SIDE, as_last, convolve, meant, processors, shared
from cifar.kernels.triton.conv_relu_pool import halved, pooled
from cifar.kernels.triton.max_pool import LEAST, halve, suits


def asked(x: Tensor) -> bool:
    """Whether kernels are used now: where autocast is on."""
    return Quick.precision == torch.float32 or torch.is_autocast_enabled(x.device.type)


class Quick(nn.Conv2d):
    """The same convolution, by a kernel where one is asked for."""

    precision = torch.bfloat16  # as autocast has it in cifar.training.step

    def forward(self, x: Tensor) -> Tensor:
        if not asked(x):
            return super().forward(x)
        y: Tensor = convolve(x.to(self.precision), self.weight, False)
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]


class QuickPooled(Quick):
    """The same, which does the work of the ReLU and of the pooling after it too."""

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None or not asked(x):
            return super().forward(x)
        y: Tensor = pooled(x.to(self.precision), self.weight, self.bias)[0]
        return y


class DoneReLU(nn.ReLU):
    """Nothing, where the convolution before has done it."""

    def forward(self, x: Tensor) -> Tensor:
        return x if asked(x) else super().forward(x)


class DonePool(nn.MaxPool2d):
    """Nothing, where the convolution before has done it."""

    def forward(self, x: Tensor) -> Tensor:
        return x if asked(x) else super().forward(x)


class QuickPool(nn.MaxPool2d):
    """The same 2 x 2 max-pooling, by a kernel where one is asked for."""

    def forward(self, x: Tensor) -> Tensor:
        ours = asked(x) and x.dtype == Quick.precision and x.dim() == 4 and suits(x.shape[1])
        y: Tensor = halve(as_last(x))[0] if ours else super().forward(x)
        return y


class NormRow(nn.Sequential):
    """A convolution, BatchNorm and, if there is one, ReLU as they were; by kernels in training where those are asked for."""

    processors: int  # of the GPU. How many sums are made is part of what is compiled, and kept for other processes

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self[0], self[1]
        assert isinstance(norm, nn.BatchNorm2d)
        mean, variance, batches, momentum = norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum
        follows = norm.training and norm.track_running_stats and momentum is not None
        if (
            not (asked(x) and follows)
            or mean is None
            or variance is None
            or batches is None
            or any(_watched(part) for part in self)
        ):
            return super().forward(x)  # type: ignore[no-any-return, no-untyped-call]
        if type(conv) is Quick:
            programs = shared(x.shape, conv.out_channels, self.processors)
            y, parts = convolve_sums(x.to(Quick.precision), conv.weight, mean, programs)
        else:
            y = conv(x)
            parts = pixel_sums(y.detach(), mean, summing(y.shape, self.processors))
        moments = statistics(parts.detach(), mean, variance, batches, y.numel() // y.shape[1], momentum)
        z: Tensor = normalised(y, moments, norm.weight, norm.bias, norm.eps, len(self) == 3)
        return z


@torch.no_grad()
def quicken(model: nn.Module, images: Tensor) -> int:
    """Let the modules that these kernels are for use them -> how many convolutions do. Weights and names stay.

    images (1, 3, H, W), with any content: they say how large the images are that each convolution gets, and who gets what.
    """
    calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}  # what went in and what came out, kept so that `is` can tell

    def watch(module: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        if given:
            calls.setdefault(module, []).append((given[0], made))

    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.Sequential)
    watched = [m for m in model.modules() if type(m) in kinds and not _watched(m)]
    hooks, was = [module.register_forward_hook(watch) for module in watched], model.training
    try:
        model.eval()(images)
    finally:
        model.train(was)
        for hook in hooks:
            hook.remove()
    found = []
    for module, seen in calls.items():
        if type(module) is nn.Conv2d and _fits(module, [given for given, _ in seen]):
            module.__class__ = Quick
            found.append(module)
    for parent in calls:
        children = list(parent) if isinstance(parent, nn.Sequential) else []
        if _is_norm_row(children) and all(child in calls for child in children):
            parent.__class__ = NormRow
            parent.processors = processors(images.device)  # type: ignore[assignment]
        for row in zip(children, children[1:], children[2:], strict=False):
            first, relu, pool = row
            if type(first) is not Quick or first.bias is None or type(relu) is not nn.ReLU or not _is_half(pool):
                continue
            if _in_a_row(parent, row, calls) and halved(first.in_channels, first.out_channels, *calls[first][0][0].shape[2:]):
                first.__class__, relu.__class__, pool.__class__ = QuickPooled, DoneReLU, DonePool
    made = [out for module, seen in calls.items() if isinstance(module, nn.Conv2d) for _, out in seen]
    for module, seen in calls.items():  # behind a ReLU or BatchNorm it would split what a compiler makes one kernel of
        wide = all(given.dim() == 4 and given.shape[1] >= LEAST for given, _ in seen)
        if wide and _is_half(module) and all(any(given is out for out in made) for given, _ in seen):
            module.__class__ = QuickPool
    return len(found)


def _in_a_row(parent: nn.Module, row: Sequence[nn.Module], calls: Mapping[nn.Module, Sequence[tuple[Tensor, Tensor]]]) -> bool:
    """Whether each of these was called once, by the parent, with what the one before it made: nobody else sees that."""
    if any(len(calls.get(module, ())) != 1 for module in (parent, *row)):
        return False
    return all(calls[a][0][1] is calls[b][0][0] for a, b in itertools.pairwise(row))


def _watched(module: nn.Module) -> bool:
    """Whether somebody looks at what goes in or comes out."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(len(known) > 0 for known in hooks)


def _is_norm_row(row: Sequence[nn.Module]) -> bool:
    """Whether these are a convolution without a bias and an ordinary BatchNorm of few channels, and at most a ReLU."""
    if not 2 <= len(row) <= 3 or (len(row) == 3 and type(row[2]) is not nn.ReLU):
        return False
    conv, norm = row[:2]
    if type(norm) is not nn.BatchNorm2d:
        return False
    whole = norm.affine and norm.running_mean is not None and norm.momentum is not None and norm.num_features <= MOST
    return isinstance(conv, nn.Conv2d) and conv.bias is None and whole


def _fits(module: nn.Conv2d, images: Sequence[Tensor]) -> bool:
    """Whether our kernels are for this convolution of such images."""
    if any(x.dim() != 4 or not meant(module.in_channels, module.out_channels, *x.shape[2:]) for x in images):
        return False
    plain = module.groups == 1 and module.padding_mode == "zeros" and module.padding in ((1, 1), "same")
    near = module.kernel_size == (SIDE, SIDE) and module.stride == module.dilation == (1, 1)
    return plain and near and module.weight.requires_grad and (module.bias is None or module.bias.requires_grad)


def _is_half(pool: nn.Module) -> bool:
    """Whether a module is 2 x 2 max-pooling and nothing else."""
    if type(pool) is not nn.MaxPool2d or pool.return_indices or pool.ceil_mode:
        return False
    pairs = ((pool.kernel_size, 2), (pool.stride, 2), (pool.padding, 0), (pool.dilation, 1))
    return all(given in (wanted, (wanted, wanted)) for given, wanted in pairs)
