"""The Triton kernels of 3 x 3 convolutions with few channels, and what other kernels share with them.

The three taps of a filter row, which lie beside each other in memory when channels come last, are one row of a matrix product,
and four lines of images are worked on together, so that a line is read once for the three filter rows that need it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def line_of(x, inside, row, HEIGHT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The taps at x; zeros where a line is outside of the image."""
    return tl.load(x, mask=inside & ((row >= 0) & (row < HEIGHT))[:, None], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def places_of(  # type: ignore[no-untyped-def]
    block, k, places, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, BLOCK: tl.constexpr
):
    """A block's places (a column of four lines each): their numbers, first pixels, rows, and which taps are in the image."""
    place = block * BLOCK + tl.arange(0, BLOCK)
    p = place // WIDTH * (4 * WIDTH) + place % WIDTH
    row = place // WIDTH * 4 % HEIGHT
    there = (place % WIDTH)[:, None] + (k // IN)[None, :] - 1
    inside = (k < 3 * IN)[None, :] & (there >= 0) & (there < WIDTH) & (place < places)[:, None]
    return place, p, row, inside


@triton.jit
def plus(one, other):  # type: ignore[no-untyped-def]
    return one + other


@triton.jit  # type: ignore[untyped-decorator]
def pivot_of(running_mean, c, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What sums are taken of differences to: the running mean, and zero where that is not finite."""
    pivot = tl.load(running_mean + c, mask=c < SIZE, other=0.0)
    return tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0)


@triton.jit
def with_more(first, second, value, middle, inside):  # type: ignore[no-untyped-def]
    """The sums of what was seen less the middle, and of its square, with these values."""
    off = tl.where(inside, value.to(tl.float32) - middle, 0.0)
    return first + off, second + off * off


@triton.jit  # type: ignore[untyped-decorator]
def keep_sums(first, second, parts, c, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """parts[program, 0 and 1, c] = the sums of all rows."""
    to = parts + tl.program_id(0) * (2 * SIZE) + c
    tl.store(to, tl.reduce(first, 0, plus), mask=c < SIZE)
    tl.store(to + SIZE, tl.reduce(second, 0, plus), mask=c < SIZE)


@triton.jit  # type: ignore[untyped-decorator]
def convolve_lines(  # type: ignore[no-untyped-def]
    x, weight, y, pivot, parts, places, programs, s_out, s_in, s_row, s_column, SUMS: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    TAPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[p, o] = sum of x[p + offset, i] * weight[o, i, row, column]; x (pixels, IN) and y (pixels, OUT), channels last.

    TAPS and COLUMNS: 3 * IN and OUT, rounded up to powers of two of at least 16. With SUMS, parts[program]: the sums of
    y - pivot and of its square, (2, OUT), over the program's pixels; without, neither of the two is looked at.
    """
    k, o = tl.arange(0, TAPS), tl.arange(0, COLUMNS)
    column, i = k // IN, k % IN
    where = weight + column[:, None] * s_column + i[:, None] * s_in + o[None, :] * s_out
    known = (k < 3 * IN)[:, None] & (o < OUT)[None, :]
    above = tl.load(where, mask=known, other=0.0).to(x.dtype.element_ty)
    level = tl.load(where + s_row, mask=known, other=0.0).to(x.dtype.element_ty)
    below = tl.load(where + 2 * s_row, mask=known, other=0.0).to(x.dtype.element_ty)
    first = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
    second = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
    if SUMS:
        middle = pivot_of(pivot, o, OUT)[None, :]
    for block in range(tl.program_id(0), (places + BLOCK - 1) // BLOCK, programs):
        place, p, row, inside = places_of(block, k, places, HEIGHT, WIDTH, IN, BLOCK)
        taps = x + p[:, None] * IN + (k - IN)[None, :]
        to = y + p[:, None] * OUT + o[None, :]
        out = (place < places)[:, None] & (o < OUT)[None, :]
        line0 = line_of(taps - WIDTH * IN, inside, row - 1, HEIGHT)
        line1 = tl.load(taps, mask=inside, other=0.0)
        line2 = tl.load(taps + WIDTH * IN, mask=inside, other=0.0)
        line3 = tl.load(taps + 2 * WIDTH * IN, mask=inside, other=0.0)
        line4 = tl.load(taps + 3 * WIDTH * IN, mask=inside, other=0.0)
        line5 = line_of(taps + 4 * WIDTH * IN, inside, row + 4, HEIGHT)
        total = tl.dot(line2, below, tl.dot(line1, level, tl.dot(line0, above)))
        total = total.to(y.dtype.element_ty)
        tl.store(to, total, mask=out)
        if SUMS:
            first, second = with_more(first, second, total, middle, out)
        total = tl.dot(line3, below, tl.dot(line2, level, tl.dot(line1, above)))
        total = total.to(y.dtype.element_ty)
        tl.store(to + WIDTH * OUT, total, mask=out)
        if SUMS:
            first, second = with_more(first, second, total, middle, out)
        total = tl.dot(line4, below, tl.dot(line3, level, tl.dot(line2, above)))
        total = total.to(y.dtype.element_ty)
        tl.store(to + 2 * WIDTH * OUT, total, mask=out)
        if SUMS:
            first, second = with_more(first, second, total, middle, out)
        total = tl.dot(line5, below, tl.dot(line4, level, tl.dot(line3, above)))
        total = total.to(y.dtype.element_ty)
        tl.store(to + 3 * WIDTH * OUT, total, mask=out)
        if SUMS:
            first, second = with_more(first, second, total, middle, out)
    if SUMS:
        keep_sums(first, second, parts, o, OUT)


@triton.jit  # type: ignore[untyped-decorator]
def correlate_lines(  # type: ignore[no-untyped-def]
    x, g, parts, places, programs,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    TAPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts[program, o, row, column * IN + i] = sum of x[p + offset, i] * g[p, o] over the program's pixels."""
    k, o = tl.arange(0, TAPS), tl.arange(0, COLUMNS)
    above = tl.full((TAPS, COLUMNS), 0.0, tl.float32)
    level = tl.full((TAPS, COLUMNS), 0.0, tl.float32)
    below = tl.full((TAPS, COLUMNS), 0.0, tl.float32)
    for block in range(tl.program_id(0), (places + BLOCK - 1) // BLOCK, programs):
        place, p, row, inside = places_of(block, k, places, HEIGHT, WIDTH, IN, BLOCK)
        taps = x + p[:, None] * IN + (k - IN)[None, :]
        at = g + p[:, None] * OUT + o[None, :]
        out = (place < places)[:, None] & (o < OUT)[None, :]
        g0 = tl.load(at, mask=out, other=0.0)
        g1 = tl.load(at + WIDTH * OUT, mask=out, other=0.0)
        g2 = tl.load(at + 2 * WIDTH * OUT, mask=out, other=0.0)
        g3 = tl.load(at + 3 * WIDTH * OUT, mask=out, other=0.0)
        line = tl.trans(line_of(taps - WIDTH * IN, inside, row - 1, HEIGHT))
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
        line = tl.trans(line_of(taps + 4 * WIDTH * IN, inside, row + 4, HEIGHT))
        below = tl.dot(line, g3, below)
    where = parts + tl.program_id(0) * (9 * IN * OUT) + k[:, None] + o[None, :] * (9 * IN)
    known = (k < 3 * IN)[:, None] & (o < OUT)[None, :]
    tl.store(where, above, mask=known)
    tl.store(where + 3 * IN, level, mask=known)
    tl.store(where + 6 * IN, below, mask=known)


@triton.jit  # type: ignore[untyped-decorator]
def add_parts(parts, total, programs, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """total[c] = sum of parts[program, c] over the programs."""
    c, row = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    found = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for first in range(0, programs, ROWS):
        inside = (first + row < programs)[:, None] & (c < SIZE)[None, :]
        found += tl.load(parts + (first + row)[:, None] * SIZE + c[None, :], mask=inside, other=0.0)
    tl.store(total + c, tl.reduce(found, 0, plus), mask=c < SIZE)
