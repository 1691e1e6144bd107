"""The Triton kernels of batch_norm.py: sums over all pixels, made by many programs.

A program writes the sums of its own pixels. A second, small kernel adds these up, always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cifar.kernels.triton.conv3x3_kernels import accumulate_moments, add, load_pivot, store_sums


@triton.jit
def sum_pixels(x, pivot, partials, pixels, num_programs, SIZE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """partials[program]: the sums of x - pivot and of its square, (2, SIZE). x (pixels, SIZE); COLUMNS: SIZE, rounded up."""
    c = tl.arange(0, COLUMNS)
    pivot_value = load_pivot(pivot, c, SIZE)[None, :]
    first = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
    second = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
    for block in range(tl.program_id(0), (pixels + BLOCK - 1) // BLOCK, num_programs):
        p = block * BLOCK + tl.arange(0, BLOCK)
        inside = (p < pixels)[:, None] & (c < SIZE)[None, :]
        value = tl.load(x + p[:, None] * SIZE + c[None, :], mask=inside, other=0.0)
        first, second = accumulate_moments(first, second, value, pivot_value, inside)
    store_sums(first, second, partials, c, SIZE)


@triton.jit
def sum_gradients(
    g, x, moments, weight, bias, partials, pixels, num_programs, eps,
    RELU: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partials[program]: the sums of g and of g * (x - mean) / deviation, (2, SIZE).

    With RELU only where BatchNorm's result is above zero. The pixels are read from the last to the first, because the next
    kernel begins with the first, which are in the cache then.
    """
    c = tl.arange(0, COLUMNS)
    valid = c < SIZE
    mean = tl.load(moments + c, mask=valid, other=0.0)[None, :]
    inv_std = 1 / tl.sqrt(tl.load(moments + SIZE + c, mask=valid, other=1.0) + eps)[None, :]
    scale = tl.load(weight + c, mask=valid, other=0.0)[None, :] * inv_std
    shift = tl.load(bias + c, mask=valid, other=0.0)[None, :]
    first = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
    second = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
    blocks = (pixels + BLOCK - 1) // BLOCK
    for block in range(tl.program_id(0), blocks, num_programs):
        p = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        sources = p[:, None] * SIZE + c[None, :]
        inside = (p < pixels)[:, None] & valid[None, :]
        gradient = tl.load(g + sources, mask=inside, other=0.0).to(tl.float32)
        centered = tl.load(x + sources, mask=inside, other=0.0).to(tl.float32) - mean
        if RELU:
            gradient = tl.where(centered * scale + shift > 0, gradient, 0.0)
        first += gradient
        second += gradient * centered
    store_sums(first, second * inv_std, partials, c, SIZE)


@triton.jit
def add_moments(
    partials, running_mean, running_variance, batches, moments, count, num_programs, momentum, unbiased,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """moments (2, SIZE): mean and variance of `count` pixels, from each program's sums of x - running_mean and of its square.

    The running statistics then move towards these by the fraction `momentum`; the variance is first multiplied by `unbiased`.
    """
    c, row = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    first = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    second = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for start in range(0, num_programs, ROWS):
        inside = (start + row < num_programs)[:, None] & (c < SIZE)[None, :]
        sources = partials + (start + row)[:, None] * (2 * SIZE) + c[None, :]
        first += tl.load(sources, mask=inside, other=0.0)
        second += tl.load(sources + SIZE, mask=inside, other=0.0)
    valid = c < SIZE
    centered = tl.reduce(first, 0, add) / count
    variance = tl.reduce(second, 0, add) / count - centered * centered
    variance = tl.where(variance < 0, 0.0, variance)  # rounding; NaN stays
    mean = load_pivot(running_mean, c, SIZE) + centered
    tl.store(moments + c, mean, mask=valid)
    tl.store(moments + SIZE + c, variance, mask=valid)
    before = tl.load(running_mean + c, mask=valid, other=0.0)
    tl.store(running_mean + c, before + momentum * (mean - before), mask=valid)
    before = tl.load(running_variance + c, mask=valid, other=0.0)
    tl.store(running_variance + c, before + momentum * (variance * unbiased - before), mask=valid)
    if tl.program_id(0) == 0:
        tl.store(batches, tl.load(batches) + 1)
