"""A convolution, a ReLU and max-pooling on a CPU, a few images at a time, so that what lies between stays in the cache.

What a convolution makes is the largest thing in a step: a batch of it is written to memory and read again by each of the
others, forward and backward, and often comes in pages that the system has to clear first. Here it never leaves the cache, and
only what the pool leaves is kept. ReLU comes after the pool: the largest number is the same, and so is its place if it is
above zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

PIECE = 4 * 2**20  # bytes of a convolution's output at once, for one thread or two; 2 and 4 MiB are quickest (LOG.md)
LOWERED = torch.float32, torch.bfloat16, torch.float16  # what autocast casts

Row = tuple[nn.Conv2d, nn.ReLU, nn.MaxPool2d]
Pool = tuple[list[int], list[int], list[int], list[int], bool]  # side, stride, padding, dilation, rounded up
Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]  # stride, padding, dilation, groups

aten = torch.ops.aten


class Pooled(torch.autograd.Function):
    """relu(max_pool2d(conv2d(x, weight, bias))) and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, pool: Pool) -> Tensor:
        """x (B, C, H, W) -> (B, C', H', W'), in the memory format that torch gives it."""
        stride, padding, dilation, groups = geometry
        made = kept = which = torch.empty(0)
        for piece in pieces(x, weight, geometry):
            full = aten.convolution(x[piece], weight, bias, stride, padding, dilation, False, [0, 0], groups)
            if not piece.start:
                likes = aten.max_pool2d_with_indices(full[:1], *pool)
                ctx.full, ctx.layout = full.shape[1:], _layout(likes[0])
                made, kept, which = (_room(likes[index], len(x), ctx.layout) for index in (0, 0, 1))
            aten.max_pool2d_with_indices.out(full, *pool, out=made[piece], indices=which[piece])
            kept[piece] = made[piece].relu_()  # apart from `made`, for whoever gets that may change it
        ctx.save_for_backward(x, weight, kept, which)
        ctx.geometry, ctx.pool, ctx.sizes = geometry, pool, None if bias is None else [len(weight)]
        return made

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, kept, which = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        wanted = list(ctx.needs_input_grad[:3])
        x_grad = torch.empty_like(x) if wanted[0] else None
        sums: list[Tensor | None] = [None, None]
        for piece in pieces(x, weight, ctx.geometry):
            part = g[piece].contiguous(memory_format=ctx.layout)  # in another one, the pool would copy all that it makes
            part = aten.threshold_backward(part, kept[piece], 0)
            shape = torch.empty((len(part), *ctx.full), dtype=g.dtype, memory_format=ctx.layout)  # nobody reads its content
            full = aten.max_pool2d_with_indices_backward(part, shape, *ctx.pool, which[piece])
            of_x, *found = aten.convolution_backward(
                full, x[piece], weight, ctx.sizes, stride, padding, dilation, False, [0, 0], groups, wanted
            )
            if x_grad is not None:
                x_grad[piece] = of_x
            found = [None if new is None else new.to(torch.promote_types(new.dtype, torch.float32)) for new in found]
            sums = [new if old is None else old.add_(new) for old, new in zip(sums, found, strict=True)]
        return x_grad, *(None if each is None else each.to(weight.dtype) for each in sums), None, None


def pieces(x: Tensor, weight: Tensor, geometry: Geometry) -> Iterator[slice]:
    """Which images at once: all of them, if they are few. Many threads want more to share, and have more cache."""
    most, size = PIECE * max(1, torch.get_num_threads() // 2), len(weight) * x.element_size()
    for side, kernel, stride, padding, dilation in zip(x.shape[2:], weight.shape[2:], *geometry[:3], strict=True):
        size *= (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1  # bytes of an image's output
    count = len(x) if size * len(x) < 2 * most else max(1, most // size)
    return (slice(start, min(start + count, len(x))) for start in range(0, len(x), count))


def _layout(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _room(like: Tensor, count: int, layout: torch.memory_format) -> Tensor:
    return torch.empty((count, *like.shape[1:]), dtype=like.dtype, memory_format=layout)


class InPieces(nn.Sequential):
    """The same modules one after the other, but for rows of a convolution, a ReLU and max-pooling, which are one."""

    def forward(self, input: Any) -> Any:
        modules, x, ours = list(self), input, not _traced()
        while modules:
            row = modules[:3]
            if ours and _may_be_one(row) and _may_be_cut(x, row[0]):
                x = _as_one(row, x)
            else:
                row = modules[:1]
                x = row[0](x)
            modules = modules[len(row) :]
        return x

    def _get_name(self) -> str:
        return "Sequential"


def _traced() -> bool:
    """Whether somebody looks at the operations, so that they had better be torch's own."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def _may_be_one(row: Sequence[nn.Module]) -> TypeGuard[Row]:
    """Whether these are a convolution, a ReLU and a pool, as torch has them, and nobody looks at one of them."""
    if [type(module) for module in row] != [nn.Conv2d, nn.ReLU, nn.MaxPool2d] or _has_any_global_hook():  # type: ignore[no-untyped-call]
        return False
    for module in row:
        hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
        if any(hooks) or "forward" in vars(module):
            return False
    conv, _, pool = row
    zeros = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return zeros and not pool.return_indices


def _may_be_cut(x: Any, conv: nn.Conv2d) -> bool:
    """Whether this is a batch of images on the CPU that the convolution takes, and nothing that torch treats in another way."""
    if type(x) is not Tensor or type(conv.weight) not in (Tensor, nn.Parameter) or x.device.type != "cpu":
        return False
    if x.dim() != 4 or not len(x) or x.shape[1] != conv.in_channels:
        return False
    if torch.is_autocast_enabled("cpu"):
        return x.dtype in LOWERED and conv.weight.dtype in LOWERED
    return x.dtype == conv.weight.dtype


def _as_one(row: Row, x: Tensor) -> Tensor:
    conv, _, pool = row
    given: list[Tensor | None] = [x, conv.weight, conv.bias]
    if torch.is_autocast_enabled("cpu"):
        given = [each if each is None else each.to(torch.get_autocast_dtype("cpu")) for each in given]
    side, stride, padding, dilation = (
        [value, value] if isinstance(value, int) else list(value)
        for value in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    )
    geometry = conv.stride, conv.padding, conv.dilation, conv.groups
    return cast(Tensor, Pooled.apply(*given, geometry, (side, stride, padding, dilation, pool.ceil_mode)))


def in_pieces(model: nn.Module) -> int:
    """Let every plain Sequential that has such rows take them as one -> how many it has found. Modules, weights, names stay."""
    found = 0
    for module in model.modules():
        if type(module) is nn.Sequential:
            children = list(module)
            rows = sum(_may_be_one(children[index : index + 3]) for index in range(len(children)))
            if rows:
                module.__class__ = InPieces
            found += rows
    return found
