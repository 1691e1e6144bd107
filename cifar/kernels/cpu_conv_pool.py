"""A convolution, a ReLU and max-pooling on a CPU, for a few images at a time, so that what lies between stays in the cache.

The output of a convolution is the largest thing in a step. For a whole batch it is written to memory and read again by each of
the other two, forward and backward, and often it comes in pages that the system has to clear first. Here it never leaves the
cache, and only what the pool leaves is kept. ReLU comes after the pool: the largest number is the same, and so is its place if
it is above zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

CHUNK_BYTES = 4 * 2**20  # of a convolution's output at once, for one thread or two; 2 and 4 MiB are quickest (LOG.md)
AUTOCAST_DTYPES = torch.float32, torch.bfloat16, torch.float16  # what autocast casts

ConvReLUPoolRow = tuple[nn.Conv2d, nn.ReLU, nn.MaxPool2d]
PoolGeometry = tuple[list[int], list[int], list[int], list[int], bool]  # side, stride, padding, dilation, rounded up
ConvGeometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]  # stride, padding, dilation, groups

aten = torch.ops.aten


class ConvReLUPool(torch.autograd.Function):
    """relu(max_pool2d(conv2d(x, weight, bias))) and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, pool: PoolGeometry) -> Tensor:
        """x (B, C, H, W) -> (B, C', H', W'), in the memory format that torch gives it."""
        stride, padding, dilation, groups = geometry
        y = y_saved = indices = torch.empty(0)
        for chunk in split_batch(x, weight, geometry):
            full = aten.convolution(x[chunk], weight, bias, stride, padding, dilation, False, [0, 0], groups)
            if not chunk.start:
                samples = aten.max_pool2d_with_indices(full[:1], *pool)
                ctx.full, ctx.layout = full.shape[1:], _memory_format(samples[0])
                y, y_saved, indices = (_empty_images(samples[output], len(x), ctx.layout) for output in (0, 0, 1))
            aten.max_pool2d_with_indices.out(full, *pool, out=y[chunk], indices=indices[chunk])
            y_saved[chunk] = y[chunk].relu_()  # a copy, because whoever gets y may change it
        ctx.save_for_backward(x, weight, y_saved, indices)
        ctx.geometry, ctx.pool, ctx.sizes = geometry, pool, None if bias is None else [len(weight)]
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y_saved, indices = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        output_mask = list(ctx.needs_input_grad[:3])
        x_grad = torch.empty_like(x) if output_mask[0] else None
        sums: list[Tensor | None] = [None, None]
        for chunk in split_batch(x, weight, ctx.geometry):
            g_chunk = g[chunk].contiguous(memory_format=ctx.layout)  # else the pool would copy its whole result
            g_chunk = aten.threshold_backward(g_chunk, y_saved[chunk], 0)
            like = torch.empty((len(g_chunk), *ctx.full), dtype=g.dtype, memory_format=ctx.layout)  # its content is not read
            full = aten.max_pool2d_with_indices_backward(g_chunk, like, *ctx.pool, indices[chunk])
            x_part, *parts = aten.convolution_backward(
                full, x[chunk], weight, ctx.sizes, stride, padding, dilation, False, [0, 0], groups, output_mask
            )
            if x_grad is not None:
                x_grad[chunk] = x_part
            parts = [None if new is None else new.to(torch.promote_types(new.dtype, torch.float32)) for new in parts]
            sums = [new if old is None else old.add_(new) for old, new in zip(sums, parts, strict=True)]
        return x_grad, *(None if total is None else total.to(weight.dtype) for total in sums), None, None


def split_batch(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Iterator[slice]:
    """Which images to take at once: all, if they are few. Many threads need more work to share, and have more cache."""
    max_bytes, image_bytes = CHUNK_BYTES * max(1, torch.get_num_threads() // 2), len(weight) * x.element_size()
    for side, kernel, stride, padding, dilation in zip(x.shape[2:], weight.shape[2:], *geometry[:3], strict=True):
        image_bytes *= (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1  # in the end: of its output
    count = len(x) if image_bytes * len(x) < 2 * max_bytes else max(1, max_bytes // image_bytes)
    return (slice(start, min(start + count, len(x))) for start in range(0, len(x), count))


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _empty_images(like: Tensor, count: int, layout: torch.memory_format) -> Tensor:
    return torch.empty((count, *like.shape[1:]), dtype=like.dtype, memory_format=layout)


class ChunkedSequential(nn.Sequential):
    """The same modules one after the other, but each row of a convolution, a ReLU and max-pooling is computed as one."""

    def forward(self, input: Any) -> Any:
        modules, x, may_fuse = list(self), input, not _is_traced()
        while modules:
            row = modules[:3]
            if may_fuse and _is_conv_relu_pool(row) and _can_chunk(x, row[0]):
                x = _apply_fused(row, x)
            else:
                row = modules[:1]
                x = row[0](x)
            modules = modules[len(row) :]
        return x

    def _get_name(self) -> str:
        return "Sequential"


def _is_traced() -> bool:
    """Whether the operations are being recorded (by a compiler, say), so that they have to be torch's own."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def _is_conv_relu_pool(row: Sequence[nn.Module]) -> TypeGuard[ConvReLUPoolRow]:
    """Whether these are torch's own convolution, ReLU and max-pooling, without hooks."""
    if [type(module) for module in row] != [nn.Conv2d, nn.ReLU, nn.MaxPool2d] or _has_any_global_hook():
        return False
    for module in row:
        hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
        if any(hooks) or "forward" in vars(module):
            return False
    conv, _, pool = row
    pads_zeros = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return pads_zeros and not pool.return_indices


def _can_chunk(x: Any, conv: nn.Conv2d) -> bool:
    """Whether x is a batch of images on the CPU that the convolution takes, and an ordinary tensor."""
    if type(x) is not Tensor or type(conv.weight) not in (Tensor, nn.Parameter) or x.device.type != "cpu":
        return False
    if x.dim() != 4 or not len(x) or x.shape[1] != conv.in_channels:
        return False
    if torch.is_autocast_enabled("cpu"):
        return x.dtype in AUTOCAST_DTYPES and conv.weight.dtype in AUTOCAST_DTYPES
    return x.dtype == conv.weight.dtype


def _apply_fused(row: ConvReLUPoolRow, x: Tensor) -> Tensor:
    conv, _, pool = row
    inputs: list[Tensor | None] = [x, conv.weight, conv.bias]
    if torch.is_autocast_enabled("cpu"):
        inputs = [tensor if tensor is None else tensor.to(torch.get_autocast_dtype("cpu")) for tensor in inputs]
    side, stride, padding, dilation = (
        [value, value] if isinstance(value, int) else list(value)
        for value in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    )
    geometry = conv.stride, conv.padding, conv.dilation, conv.groups
    return cast(Tensor, ConvReLUPool.apply(*inputs, geometry, (side, stride, padding, dilation, pool.ceil_mode)))


def chunk_conv_pools(model: nn.Module) -> int:
    """Let each plain Sequential compute such rows as one -> how many rows there are. Modules, weights and names stay."""
    num_rows = 0
    for module in model.modules():
        if type(module) is nn.Sequential:
            children = list(module)
            rows_here = sum(_is_conv_relu_pool(children[index : index + 3]) for index in range(len(children)))
            if rows_here:
                module.__class__ = ChunkedSequential
            num_rows += rows_here
    return num_rows
