"""A convolution, a ReLU and 2 x 2 max-pooling on a CPU, a few images at a time, so that what lies between stays in the cache.

What a convolution makes is the largest thing in a step: a batch of it is written to memory and read again by each of the
others, forward and backward, and often comes in pages that the system has to clear first. Here it never leaves the cache, and
only the pool's quarter is kept. ReLU comes after the pool: the largest of four is the same, and so is where it stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar.kernels.rows import calls_of, in_a_row, is_half

PIECE = 4 * 2**20  # bytes of a convolution's output at once; with 2 to 8 MiB a step takes about as long (LOG.md)

Numbers = tuple[int, ...]
Geometry = tuple[Numbers, Numbers, Numbers, int]  # stride, padding, dilation, groups

aten = torch.ops.aten
POOL = [2, 2], [2, 2], [0, 0], [1, 1], False  # side, stride, padding, dilation, rounded up


class Halved(torch.autograd.Function):
    """relu(max_pool2d(conv2d(x, weight, bias), 2)) and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        """x (B, C, H, W) -> (B, C', H' // 2, W' // 2), in the memory format that the convolution gives its output."""
        stride, padding, dilation, groups = geometry
        made = which = torch.empty(0)
        for piece in pieces(x, weight, geometry):
            full = aten.convolution(x[piece], weight, bias, stride, padding, dilation, False, [0, 0], groups)
            if not piece.start:
                ctx.full, layout = full.shape[1:], _layout(full)
                shape = len(x), full.shape[1], full.shape[2] // 2, full.shape[3] // 2
                made = torch.empty(shape, dtype=full.dtype, memory_format=layout)
                which = torch.empty(shape, dtype=torch.int64, memory_format=layout)
            aten.max_pool2d_with_indices.out(full, *POOL, out=made[piece], indices=which[piece])
            made[piece].relu_()
        ctx.save_for_backward(x, weight, made, which)
        ctx.geometry, ctx.sizes = geometry, None if bias is None else [len(weight)]
        return made

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, made, which = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        layout, wanted = _layout(made), list(ctx.needs_input_grad[:3])
        x_grad = torch.empty_like(x) if wanted[0] else None
        sums: list[Tensor | None] = [None, None]
        for piece in pieces(x, weight, ctx.geometry):
            part = g[piece].contiguous(memory_format=layout)  # in another one, the pool would copy all that it makes
            part = aten.threshold_backward(part, made[piece], 0)
            shape = torch.empty((len(part), *ctx.full), dtype=g.dtype, memory_format=layout)  # nobody reads its content
            full = aten.max_pool2d_with_indices_backward(part, shape, *POOL, which[piece])
            of_x, *found = aten.convolution_backward(
                full, x[piece], weight, ctx.sizes, stride, padding, dilation, False, [0, 0], groups, wanted
            )
            if x_grad is not None:
                x_grad[piece] = of_x
            sums = [new if old is None else old.add_(new) for old, new in zip(sums, found, strict=True)]
        return x_grad, *sums, None


def pieces(x: Tensor, weight: Tensor, geometry: Geometry) -> Iterator[slice]:
    """Which images at once: all of them, if they are few."""
    size = len(weight) * x.element_size()  # bytes of an image's output
    for side, kernel, stride, padding, dilation in zip(x.shape[2:], weight.shape[2:], *geometry[:3], strict=True):
        size *= (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    count = len(x) if size * len(x) < 2 * PIECE else max(1, PIECE // size)
    return (slice(start, min(start + count, len(x))) for start in range(0, len(x), count))


def _layout(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


class HalvingConv(nn.Conv2d):
    """A convolution that does the work of the ReLU and of the pool behind it, too."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dim() != 4 or not len(x):
            return F.relu(F.max_pool2d(super().forward(x), 2))
        given: list[Tensor | None] = [x, self.weight, self.bias]
        if torch.is_autocast_enabled("cpu"):
            given = [None if each is None else each.to(torch.get_autocast_dtype("cpu")) for each in given]
        return cast(Tensor, Halved.apply(*given, (self.stride, self.padding, self.dilation, self.groups)))


def halve_early(model: nn.Module, images: Tensor) -> int:
    """Let each convolution with a ReLU and a halving pool behind it do their work -> how many. Weights and names stay.

    images (1, 3, H, W), with any content: they say who gets what.
    """
    rows = [(parent, row) for parent in model.modules() if type(parent) is nn.Sequential for row in _rows(list(parent))]
    if not rows:
        return 0
    calls = calls_of(model, images, (nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Sequential))
    taken = [row for parent, row in rows if in_a_row(parent, row, calls)]
    for conv, relu, pool in taken:
        conv.__class__ = HalvingConv
        relu.__class__ = pool.__class__ = nn.Identity
    return len(taken)


def _rows(children: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, nn.Module, nn.Module]]:
    for conv, relu, pool in zip(children, children[1:], children[2:], strict=False):
        plain = type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        if plain and type(relu) is nn.ReLU and is_half(pool):
            yield conv, relu, pool
