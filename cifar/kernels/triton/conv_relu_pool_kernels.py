"""The Triton kernels of `pooled`: a convolution is pooled before it is written, and its gradient spread as it is read.

A square is four pixels that pooling makes one; `which` of them it was is 0 to 3, or 4 where none was above zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cifar.kernels.triton.conv3x3_kernels import line_of, places_of


@triton.jit
def _larger(one, other):  # type: ignore[no-untyped-def]
    return tl.maximum(one, other)


@triton.jit  # type: ignore[untyped-decorator]
def _ranked(value, rank, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    """ReLU as an integer that is the larger the larger the value is, and its rank in the last two bits. NaN is largest."""
    value = value.to(kind).to(tl.float32)
    value = tl.where((value > 0) | (value != value), value, 0.0)
    return (value.to(tl.int32, bitcast=True) & 0x7FFFFFFC) | rank


@triton.jit  # type: ignore[untyped-decorator]
def _keep(highest, y, which, to, inside, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store the largest of each pair of neighbouring columns, and where it was."""
    highest = tl.reduce(tl.reshape(highest, (BLOCK // 2, 2, COLUMNS)), 1, _larger)
    value = (highest & 0x7FFFFFFC).to(tl.float32, bitcast=True)
    tl.store(y + to, value.to(y.dtype.element_ty), mask=inside)
    tl.store(which + to, tl.where(value == 0, 4, 3 - (highest & 3)).to(tl.int8), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def convolve_pool(  # type: ignore[no-untyped-def]
    x, weight, bias, y, which, places, programs, s_out, s_in, s_row, s_column,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    TAPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[q, o] and which[q, o] of every 2 x 2 square q; two rows of squares a place, as it is a column of four lines."""
    k, o = tl.arange(0, TAPS), tl.arange(0, COLUMNS)
    column, i = k // IN, k % IN
    where = weight + column[:, None] * s_column + i[:, None] * s_in + o[None, :] * s_out
    known = (k < 3 * IN)[:, None] & (o < OUT)[None, :]
    kind = x.dtype.element_ty
    above = tl.load(where, mask=known, other=0.0).to(kind)
    level = tl.load(where + s_row, mask=known, other=0.0).to(kind)
    below = tl.load(where + 2 * s_row, mask=known, other=0.0).to(kind)
    more = tl.load(bias + o, mask=o < OUT, other=0.0)[None, :]
    HALF: tl.constexpr = WIDTH // 2
    for block in range(tl.program_id(0), (places + BLOCK - 1) // BLOCK, programs):
        place, p, row, inside = places_of(block, k, places, HEIGHT, WIDTH, IN, BLOCK)
        taps = x + p[:, None] * IN + (k - IN)[None, :]
        odd = (place % 2)[:, None]
        line0 = line_of(taps - WIDTH * IN, inside, row - 1, HEIGHT)
        line1 = tl.load(taps, mask=inside, other=0.0)
        line2 = tl.load(taps + WIDTH * IN, mask=inside, other=0.0)
        line3 = tl.load(taps + 2 * WIDTH * IN, mask=inside, other=0.0)
        square = block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
        to = (square // HALF * (2 * HALF) + square % HALF)[:, None] * OUT + o[None, :]
        out = (square < places // 2)[:, None] & (o < OUT)[None, :]
        first = _ranked(tl.dot(line2, below, tl.dot(line1, level, tl.dot(line0, above))) + more, 3 - odd, kind)
        second = _ranked(tl.dot(line3, below, tl.dot(line2, level, tl.dot(line1, above))) + more, 1 - odd, kind)
        _keep(tl.maximum(first, second), y, which, to, out, BLOCK, COLUMNS)
        line4 = tl.load(taps + 3 * WIDTH * IN, mask=inside, other=0.0)
        line5 = line_of(taps + 4 * WIDTH * IN, inside, row + 4, HEIGHT)
        first = _ranked(tl.dot(line4, below, tl.dot(line3, level, tl.dot(line2, above))) + more, 3 - odd, kind)
        second = _ranked(tl.dot(line5, below, tl.dot(line4, level, tl.dot(line3, above))) + more, 1 - odd, kind)
        _keep(tl.maximum(first, second), y, which, to + HALF * OUT, out, BLOCK, COLUMNS)


@triton.jit  # type: ignore[untyped-decorator]
def correlate_pool(  # type: ignore[no-untyped-def]
    x, g, which, parts, places, programs,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    TAPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts[program]: the filters' gradient over the program's pixels, (o, row, column * IN + i), and then the bias's, (o).

    The bias is a tap that is 1 everywhere: TAPS, a power of two, is never 3 * IN, so there is room for it.
    """
    k, o = tl.arange(0, TAPS), tl.arange(0, COLUMNS)
    one = (k == 3 * IN)[None, :]
    above = tl.full((TAPS, COLUMNS), 0.0, tl.float32)
    level = tl.full((TAPS, COLUMNS), 0.0, tl.float32)
    below = tl.full((TAPS, COLUMNS), 0.0, tl.float32)
    HALF: tl.constexpr = WIDTH // 2
    for block in range(tl.program_id(0), (places + BLOCK - 1) // BLOCK, programs):
        place, p, row, inside = places_of(block, k, places, HEIGHT, WIDTH, IN, BLOCK)
        taps = x + p[:, None] * IN + (k - IN)[None, :]
        q = place // WIDTH * (2 * HALF) + place % WIDTH // 2
        at = q[:, None] * OUT + o[None, :]
        out = (place < places)[:, None] & (o < OUT)[None, :]
        odd = (place % 2)[:, None]
        gradient = tl.load(g + at, mask=out, other=0.0)
        chosen = tl.load(which + at, mask=out, other=4)
        g0 = tl.where(chosen == odd, gradient, 0.0)
        g1 = tl.where(chosen == 2 + odd, gradient, 0.0)
        gradient = tl.load(g + at + HALF * OUT, mask=out, other=0.0)
        chosen = tl.load(which + at + HALF * OUT, mask=out, other=4)
        g2 = tl.where(chosen == odd, gradient, 0.0)
        g3 = tl.where(chosen == 2 + odd, gradient, 0.0)
        line = tl.trans(line_of(taps - WIDTH * IN, inside, row - 1, HEIGHT))
        above = tl.dot(line, g0, above)
        line = tl.trans(tl.where(one, 1.0, tl.load(taps, mask=inside, other=0.0)).to(x.dtype.element_ty))
        above = tl.dot(line, g1, above)
        level = tl.dot(line, g0, level)
        line = tl.trans(tl.where(one, 1.0, tl.load(taps + WIDTH * IN, mask=inside, other=0.0)).to(x.dtype.element_ty))
        above = tl.dot(line, g2, above)
        level = tl.dot(line, g1, level)
        below = tl.dot(line, g0, below)
        line = tl.trans(tl.where(one, 1.0, tl.load(taps + 2 * WIDTH * IN, mask=inside, other=0.0)).to(x.dtype.element_ty))
        above = tl.dot(line, g3, above)
        level = tl.dot(line, g2, level)
        below = tl.dot(line, g1, below)
        line = tl.trans(tl.where(one, 1.0, tl.load(taps + 3 * WIDTH * IN, mask=inside, other=0.0)).to(x.dtype.element_ty))
        level = tl.dot(line, g3, level)
        below = tl.dot(line, g2, below)
        line = tl.trans(line_of(taps + 4 * WIDTH * IN, inside, row + 4, HEIGHT))
        below = tl.dot(line, g3, below)
    parts += tl.program_id(0) * (9 * IN * OUT + OUT)
    where = parts + k[:, None] + o[None, :] * (9 * IN)
    known = (k < 3 * IN)[:, None] & (o < OUT)[None, :]
    tl.store(where, above, mask=known)
    tl.store(where + 3 * IN, level, mask=known)
    tl.store(where + 6 * IN, below, mask=known)
    where = parts + 9 * IN * OUT + k[:, None] * 0 + o[None, :]
    tl.store(where, level, mask=(k == 3 * IN)[:, None] & (o < OUT)[None, :])


@triton.jit
def _squares(g, which, at, inside):  # type: ignore[no-untyped-def]
    """Gradients of squares and where they go; nowhere outside of the image."""
    return tl.load(g + at, mask=inside, other=0.0), tl.load(which + at, mask=inside, other=4)


@triton.jit  # type: ignore[untyped-decorator]
def back_pool(  # type: ignore[no-untyped-def]
    g, which, weight, y, places, programs, s_out, s_in, s_row, s_column,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    TAPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The images' gradient y[p, o] from those of the squares (IN channels); TAPS here: IN, rounded up."""
    i, o = tl.arange(0, TAPS), tl.arange(0, COLUMNS)
    known = (i < IN)[:, None] & (o < OUT)[None, :]
    kind = g.dtype.element_ty
    HALF: tl.constexpr = WIDTH // 2
    for block in range(tl.program_id(0), (places + BLOCK - 1) // BLOCK, programs):
        place = block * BLOCK + tl.arange(0, BLOCK)
        group, x = place // WIDTH, place % WIDTH
        row = group * 4 % HEIGHT
        total0 = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
        total1 = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
        total2 = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
        total3 = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
        for column in range(3):  # not unrolled, else registers run out
            where = weight + column * s_column + i[:, None] * s_in + o[None, :] * s_out
            above = tl.load(where, mask=known, other=0.0).to(kind)
            level = tl.load(where + s_row, mask=known, other=0.0).to(kind)
            below = tl.load(where + 2 * s_row, mask=known, other=0.0).to(kind)
            there = x + column - 1
            inside = ((there >= 0) & (there < WIDTH) & (place < places))[:, None] & (i < IN)[None, :]
            there = tl.maximum(there, 0)
            odd = (there % 2)[:, None]
            at = (group * (2 * HALF) + there // 2)[:, None] * IN + i[None, :]
            gradient, chosen = _squares(g, which, at - HALF * IN, inside & (row > 0)[:, None])
            line = tl.where(chosen == 2 + odd, gradient, 0.0)
            total0 = tl.dot(line, above, total0)
            gradient, chosen = _squares(g, which, at, inside)
            line = tl.where(chosen == odd, gradient, 0.0)
            total0 = tl.dot(line, level, total0)
            total1 = tl.dot(line, above, total1)
            line = tl.where(chosen == 2 + odd, gradient, 0.0)
            total0 = tl.dot(line, below, total0)
            total1 = tl.dot(line, level, total1)
            total2 = tl.dot(line, above, total2)
            gradient, chosen = _squares(g, which, at + HALF * IN, inside)
            line = tl.where(chosen == odd, gradient, 0.0)
            total1 = tl.dot(line, below, total1)
            total2 = tl.dot(line, level, total2)
            total3 = tl.dot(line, above, total3)
            line = tl.where(chosen == 2 + odd, gradient, 0.0)
            total2 = tl.dot(line, below, total2)
            total3 = tl.dot(line, level, total3)
            gradient, chosen = _squares(g, which, at + 2 * HALF * IN, inside & (row + 4 < HEIGHT)[:, None])
            line = tl.where(chosen == odd, gradient, 0.0)
            total3 = tl.dot(line, below, total3)
        to = y + (group * (4 * WIDTH) + x)[:, None] * OUT + o[None, :]
        out = (place < places)[:, None] & (o < OUT)[None, :]
        tl.store(to, total0.to(y.dtype.element_ty), mask=out)
        tl.store(to + WIDTH * OUT, total1.to(y.dtype.element_ty), mask=out)
        tl.store(to + 2 * WIDTH * OUT, total2.to(y.dtype.element_ty), mask=out)
        tl.store(to + 3 * WIDTH * OUT, total3.to(y.dtype.element_ty), mask=out)
