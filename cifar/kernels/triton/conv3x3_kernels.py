"""The Triton kernels of 3 x 3 convolutions with few channels, and what other kernels share with them.

When channels come last, the three taps of a filter row are neighbours in memory: they are one row of a matrix product. A strip
is a column of four neighbouring pixels. The four rows of an image that strips lie in are worked on together, so that a row
is read once for the three filter rows that need it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_row(x, inside, row, HEIGHT: tl.constexpr):
    """The taps at x; zeros where the row is outside of the image."""
    return tl.load(x, mask=inside & ((row >= 0) & (row < HEIGHT))[:, None], other=0.0)


@triton.jit
def locate_strips(block, k, num_strips, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, BLOCK: tl.constexpr):
    """The strips of a block: their indices, first pixels and rows, and which of their taps are inside of the image."""
    strip = block * BLOCK + tl.arange(0, BLOCK)
    p = strip // WIDTH * (4 * WIDTH) + strip % WIDTH
    row = strip // WIDTH * 4 % HEIGHT
    there = (strip % WIDTH)[:, None] + (k // IN)[None, :] - 1
    inside = (k < 3 * IN)[None, :] & (there >= 0) & (there < WIDTH) & (strip < num_strips)[:, None]
    return strip, p, row, inside


@triton.jit
def add(one, other):
    return one + other


@triton.jit
def load_pivot(running_mean, c, SIZE: tl.constexpr):
    """What is subtracted before values are summed: the running mean, and zero where that is not finite."""
    pivot = tl.load(running_mean + c, mask=c < SIZE, other=0.0)
    return tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0)


@triton.jit
def accumulate_moments(first, second, value, pivot_value, inside):
    """Add value - pivot to the first sum and its square to the second, where `inside`."""
    centered = tl.where(inside, value.to(tl.float32) - pivot_value, 0.0)
    return first + centered, second + centered * centered


@triton.jit
def store_sums(first, second, partials, c, SIZE: tl.constexpr):
    """partials[program, 0 and 1, c] = the sums over all rows."""
    targets = partials + tl.program_id(0) * (2 * SIZE) + c
    tl.store(targets, tl.reduce(first, 0, add), mask=c < SIZE)
    tl.store(targets + SIZE, tl.reduce(second, 0, add), mask=c < SIZE)


@triton.jit
def convolve_lines(
    x, weight, y, pivot, partials, num_strips, num_programs, s_out, s_in, s_row, s_column, SUMS: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    TAPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[p, o] = sum of x[p + offset, i] * weight[o, i, row, column]; x (pixels, IN) and y (pixels, OUT), channels last.

    TAPS and COLUMNS: 3 * IN and OUT, rounded up to powers of two of at least 16. With SUMS, partials[program]: the sums of
    y - pivot and of its square, (2, OUT), over the pixels of the program; without, neither of the two is read or written.
    """
    k, o = tl.arange(0, TAPS), tl.arange(0, COLUMNS)
    column, i = k // IN, k % IN
    where = weight + column[:, None] * s_column + i[:, None] * s_in + o[None, :] * s_out
    valid = (k < 3 * IN)[:, None] & (o < OUT)[None, :]
    above = tl.load(where, mask=valid, other=0.0).to(x.dtype.element_ty)
    level = tl.load(where + s_row, mask=valid, other=0.0).to(x.dtype.element_ty)
    below = tl.load(where + 2 * s_row, mask=valid, other=0.0).to(x.dtype.element_ty)
    first = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
    second = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
    if SUMS:
        pivot_value = load_pivot(pivot, o, OUT)[None, :]
    for block in range(tl.program_id(0), (num_strips + BLOCK - 1) // BLOCK, num_programs):
        strip, p, row, inside = locate_strips(block, k, num_strips, HEIGHT, WIDTH, IN, BLOCK)
        taps = x + p[:, None] * IN + (k - IN)[None, :]
        targets = y + p[:, None] * OUT + o[None, :]
        out = (strip < num_strips)[:, None] & (o < OUT)[None, :]
        line0 = load_row(taps - WIDTH * IN, inside, row - 1, HEIGHT)
        line1 = tl.load(taps, mask=inside, other=0.0)
        line2 = tl.load(taps + WIDTH * IN, mask=inside, other=0.0)
        line3 = tl.load(taps + 2 * WIDTH * IN, mask=inside, other=0.0)
        line4 = tl.load(taps + 3 * WIDTH * IN, mask=inside, other=0.0)
        line5 = load_row(taps + 4 * WIDTH * IN, inside, row + 4, HEIGHT)
        total = tl.dot(line2, below, tl.dot(line1, level, tl.dot(line0, above)))
        total = total.to(y.dtype.element_ty)
        tl.store(targets, total, mask=out)
        if SUMS:
            first, second = accumulate_moments(first, second, total, pivot_value, out)
        total = tl.dot(line3, below, tl.dot(line2, level, tl.dot(line1, above)))
        total = total.to(y.dtype.element_ty)
        tl.store(targets + WIDTH * OUT, total, mask=out)
        if SUMS:
            first, second = accumulate_moments(first, second, total, pivot_value, out)
        total = tl.dot(line4, below, tl.dot(line3, level, tl.dot(line2, above)))
        total = total.to(y.dtype.element_ty)
        tl.store(targets + 2 * WIDTH * OUT, total, mask=out)
        if SUMS:
            first, second = accumulate_moments(first, second, total, pivot_value, out)
        total = tl.dot(line5, below, tl.dot(line4, level, tl.dot(line3, above)))
        total = total.to(y.dtype.element_ty)
        tl.store(targets + 3 * WIDTH * OUT, total, mask=out)
        if SUMS:
            first, second = accumulate_moments(first, second, total, pivot_value, out)
    if SUMS:
        store_sums(first, second, partials, o, OUT)


@triton.jit
def correlate_lines(
    x, g, partials, num_strips, num_programs,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    TAPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partials[program, o, row, column * IN + i] = sum of x[p + offset, i] * g[p, o] over the program's pixels."""
    k, o = tl.arange(0, TAPS), tl.arange(0, COLUMNS)
    above = tl.full((TAPS, COLUMNS), 0.0, tl.float32)
    level = tl.full((TAPS, COLUMNS), 0.0, tl.float32)
    below = tl.full((TAPS, COLUMNS), 0.0, tl.float32)
    for block in range(tl.program_id(0), (num_strips + BLOCK - 1) // BLOCK, num_programs):
        strip, p, row, inside = locate_strips(block, k, num_strips, HEIGHT, WIDTH, IN, BLOCK)
        taps = x + p[:, None] * IN + (k - IN)[None, :]
        sources = g + p[:, None] * OUT + o[None, :]
        out = (strip < num_strips)[:, None] & (o < OUT)[None, :]
        g0 = tl.load(sources, mask=out, other=0.0)
        g1 = tl.load(sources + WIDTH * OUT, mask=out, other=0.0)
        g2 = tl.load(sources + 2 * WIDTH * OUT, mask=out, other=0.0)
        g3 = tl.load(sources + 3 * WIDTH * OUT, mask=out, other=0.0)
        line = tl.trans(load_row(taps - WIDTH * IN, inside, row - 1, HEIGHT))
        above = tl.dot(line, g0, above)
        line = tl.trans(tl.load(taps, mask=inside, other=0.0))
        above = tl.dot(line, g1, above)
        level = tl.dot(line, g0, level)
        line = tl.trans(tl.load(taps + WIDTH * IN, mask=inside, other=0.0))
        above = tl.dot(line, g2, above)
        level = tl.dot(line, g1, level)
        below = tl.dot(line, g0, below)
        line = tl.trans(tl.load(taps + 2 * WIDTH * IN, mask=inside, other=0.0))
        above = tl.dot(line, g3, above)
        level = tl.dot(line, g2, level)
        below = tl.dot(line, g1, below)
        line = tl.trans(tl.load(taps + 3 * WIDTH * IN, mask=inside, other=0.0))
        level = tl.dot(line, g3, level)
        below = tl.dot(line, g2, below)
        line = tl.trans(load_row(taps + 4 * WIDTH * IN, inside, row + 4, HEIGHT))
        below = tl.dot(line, g3, below)
    where = partials + tl.program_id(0) * (9 * IN * OUT) + k[:, None] + o[None, :] * (9 * IN)
    valid = (k < 3 * IN)[:, None] & (o < OUT)[None, :]
    tl.store(where, above, mask=valid)
    tl.store(where + 3 * IN, level, mask=valid)
    tl.store(where + 6 * IN, below, mask=valid)


@triton.jit
def add_partials(partials, total, num_programs, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """total[c] = sum of partials[program, c] over the programs, always in the same order."""
    c, row = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    found = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for first in range(0, num_programs, ROWS):
        inside = (first + row < num_programs)[:, None] & (c < SIZE)[None, :]
        found += tl.load(partials + (first + row)[:, None] * SIZE + c[None, :], mask=inside, other=0.0)
    tl.store(total + c, tl.reduce(found, 0, add), mask=c < SIZE)
