"""The Triton kernels of `norms`: what BatchNorm has to know of all pixels, summed up by many programs.

A program writes the sums of its own pixels; a second, small kernel adds these up, always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cifar.kernels.triton.conv3x3_kernels import keep_sums, pivot_of, plus, with_more


@triton.jit  # type: ignore[untyped-decorator]
def sum_pixels(  # type: ignore[no-untyped-def]
    x, pivot, parts, pixels, programs, SIZE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    """parts[program]: the sums of x - pivot and of its square, (2, SIZE). x (pixels, SIZE); COLUMNS: SIZE, rounded up."""
    c = tl.arange(0, COLUMNS)
    middle = pivot_of(pivot, c, SIZE)[None, :]
    first = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
    second = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
    for block in range(tl.program_id(0), (pixels + BLOCK - 1) // BLOCK, programs):
        p = block * BLOCK + tl.arange(0, BLOCK)
        inside = (p < pixels)[:, None] & (c < SIZE)[None, :]
        value = tl.load(x + p[:, None] * SIZE + c[None, :], mask=inside, other=0.0)
        first, second = with_more(first, second, value, middle, inside)
    keep_sums(first, second, parts, c, SIZE)


@triton.jit  # type: ignore[untyped-decorator]
def sum_gradients(  # type: ignore[no-untyped-def]
    g, x, moments, weight, bias, parts, pixels, programs, eps,
    RELU: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts[program]: the sums of g and of g * (x - mean) / deviation, (2, SIZE); with RELU only where x came out above zero.

    From the last pixels to the first: the kernel after this one begins with the first, which are in the cache then.
    """
    c = tl.arange(0, COLUMNS)
    known = c < SIZE
    mean = tl.load(moments + c, mask=known, other=0.0)[None, :]
    rest = 1 / tl.sqrt(tl.load(moments + SIZE + c, mask=known, other=1.0) + eps)[None, :]
    scale = tl.load(weight + c, mask=known, other=0.0)[None, :] * rest
    shift = tl.load(bias + c, mask=known, other=0.0)[None, :]
    first = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
    second = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
    blocks = (pixels + BLOCK - 1) // BLOCK
    for block in range(tl.program_id(0), blocks, programs):
        p = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        at = p[:, None] * SIZE + c[None, :]
        inside = (p < pixels)[:, None] & known[None, :]
        gradient = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        off = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mean
        if RELU:
            gradient = tl.where(off * scale + shift > 0, gradient, 0.0)
        first += gradient
        second += gradient * off
    keep_sums(first, second * rest, parts, c, SIZE)


@triton.jit  # type: ignore[untyped-decorator]
def add_moments(  # type: ignore[no-untyped-def]
    parts, running_mean, running_variance, batches, moments, count, programs, momentum, unbiased,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """moments (2, SIZE): mean and variance of `count` pixels, from each program's sums of x - running_mean and of its square.

    The running statistics then move towards these: by the share `momentum`, and the variance times `unbiased`.
    """
    c, row = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    first = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    second = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for start in range(0, programs, ROWS):
        inside = (start + row < programs)[:, None] & (c < SIZE)[None, :]
        at = parts + (start + row)[:, None] * (2 * SIZE) + c[None, :]
        first += tl.load(at, mask=inside, other=0.0)
        second += tl.load(at + SIZE, mask=inside, other=0.0)
    known = c < SIZE
    off = tl.reduce(first, 0, plus) / count
    variance = tl.reduce(second, 0, plus) / count - off * off
    variance = tl.where(variance < 0, 0.0, variance)  # rounding; NaN stays
    mean = pivot_of(running_mean, c, SIZE) + off
    tl.store(moments + c, mean, mask=known)
    tl.store(moments + SIZE + c, variance, mask=known)
    before = tl.load(running_mean + c, mask=known, other=0.0)
    tl.store(running_mean + c, before + momentum * (mean - before), mask=known)
    before = tl.load(running_variance + c, mask=known, other=0.0)
    tl.store(running_variance + c, before + momentum * (variance * unbiased - before), mask=known)
    if tl.program_id(0) == 0:
        tl.store(batches, tl.load(batches) + 1)
