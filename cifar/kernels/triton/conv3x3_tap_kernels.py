"""The Triton kernels of 3 x 3 convolutions of small images with 33 to 64 channels: each tap is a matrix product of its own.

cuDNN takes as long for the products, but it also clears a workspace before each of its gradients, and adds up after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cifar.kernels.triton.conv3x3_kernels import accumulate_moments, load_pivot, store_sums


@triton.jit
def convolve_taps(
    x, weight, y, pivot, partials, pixels, num_programs, s_out, s_in, s_row, s_column, SUMS: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `conv3x3_kernels.convolve_lines`. ROWS and COLUMNS: IN and OUT, rounded up to powers of two of at least 16."""
    i, o = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    valid = (i < IN)[:, None] & (o < OUT)[None, :]
    filters = weight + i[:, None] * s_in + o[None, :] * s_out
    first = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
    second = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
    for block in range(tl.program_id(0), (pixels + BLOCK - 1) // BLOCK, num_programs):
        p = block * BLOCK + tl.arange(0, BLOCK)
        column, row = p % WIDTH, p // WIDTH % HEIGHT
        total = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
        for tap in range(9):
            down, right = tap // 3 - 1, tap % 3 - 1
            inside = (p < pixels) & (row + down >= 0) & (row + down < HEIGHT) & (column + right >= 0) & (column + right < WIDTH)
            sources = x + (p + down * WIDTH + right)[:, None] * IN + i[None, :]
            value = tl.load(sources, mask=inside[:, None] & (i < IN)[None, :], other=0.0)
            taps = tl.load(filters + tap // 3 * s_row + tap % 3 * s_column, mask=valid, other=0.0)
            total = tl.dot(value, taps.to(x.dtype.element_ty), total)
        out = (p < pixels)[:, None] & (o < OUT)[None, :]
        result = total.to(y.dtype.element_ty)
        tl.store(y + p[:, None] * OUT + o[None, :], result, mask=out)
        if SUMS:
            middle = load_pivot(pivot, o, OUT)[None, :]
            first, second = accumulate_moments(first, second, result, middle, out)
    if SUMS:
        store_sums(first, second, partials, o, OUT)


@triton.jit
def correlate_taps(
    x, g, partials, pixels, num_programs,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partials[program, o, row, column, i] = sum of x[p + offset, i] * g[p, o] over the pixels of the program.

    Programs of another index in the second dimension of the grid take another row of the filter.
    """
    i, o = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    down = tl.program_id(1) - 1
    left = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    middle = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    right = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for block in range(tl.program_id(0), (pixels + BLOCK - 1) // BLOCK, num_programs):
        p = block * BLOCK + tl.arange(0, BLOCK)
        column, row = p % WIDTH, p // WIDTH % HEIGHT + down
        there = (p < pixels) & (row >= 0) & (row < HEIGHT)
        gradient = tl.load(g + p[:, None] * OUT + o[None, :], mask=there[:, None] & (o < OUT)[None, :], other=0.0)
        sources = x + (p + down * WIDTH)[:, None] * IN + i[None, :]
        valid = (i < IN)[None, :]
        taps = tl.load(sources - IN, mask=(there & (column > 0))[:, None] & valid, other=0.0)
        left = tl.dot(tl.trans(taps), gradient, left)
        taps = tl.load(sources, mask=there[:, None] & valid, other=0.0)
        middle = tl.dot(tl.trans(taps), gradient, middle)
        taps = tl.load(sources + IN, mask=(there & (column < WIDTH - 1))[:, None] & valid, other=0.0)
        right = tl.dot(tl.trans(taps), gradient, right)
    where = partials + tl.program_id(0) * (9 * IN * OUT) + tl.program_id(1) * (3 * IN) + i[:, None] + o[None, :] * (9 * IN)
    valid = (i < IN)[:, None] & (o < OUT)[None, :]
    tl.store(where, left, mask=valid)
    tl.store(where + IN, middle, mask=valid)
    tl.store(where + 2 * IN, right, mask=valid)
