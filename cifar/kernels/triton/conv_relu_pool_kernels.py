"""The Triton kernels of conv_relu_pool.py: they pool the result of a convolution before they write it.

The gradient is unpooled as it is read. A square is four pixels that pooling makes one. Its `argmax` is which of them was the
largest, 0 to 3, or 4 where none was above zero. A strip is a column of four pixels, as in conv3x3_kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cifar.kernels.triton.conv3x3_kernels import load_row, locate_strips


@triton.jit
def _maximum(one, other):
    return tl.maximum(one, other)


@triton.jit
def _encode_rank(value, rank, element_type: tl.constexpr):
    """ReLU of the value as an integer of the same order, with the rank in its last two bits. NaN is the largest."""
    value = value.to(element_type).to(tl.float32)
    value = tl.where((value > 0) | (value != value), value, 0.0)
    return (value.to(tl.int32, bitcast=True) & 0x7FFFFFFC) | rank


@triton.jit
def _store_pooled(highest, y, argmax, targets, inside, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Store the largest value of each pair of neighbouring columns, and its argmax."""
    highest = tl.reduce(tl.reshape(highest, (BLOCK // 2, 2, COLUMNS)), 1, _maximum)
    value = (highest & 0x7FFFFFFC).to(tl.float32, bitcast=True)
    tl.store(y + targets, value.to(y.dtype.element_ty), mask=inside)
    tl.store(argmax + targets, tl.where(value == 0, 4, 3 - (highest & 3)).to(tl.int8), mask=inside)


@triton.jit
def convolve_pool(
    x, weight, bias, y, argmax, num_strips, num_programs, s_out, s_in, s_row, s_column,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    TAPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[q, o] and argmax[q, o] of every 2 x 2 square q. A strip of four pixels belongs to two rows of squares."""
    k, o = tl.arange(0, TAPS), tl.arange(0, COLUMNS)
    column, i = k // IN, k % IN
    where = weight + column[:, None] * s_column + i[:, None] * s_in + o[None, :] * s_out
    valid = (k < 3 * IN)[:, None] & (o < OUT)[None, :]
    element_type = x.dtype.element_ty
    above = tl.load(where, mask=valid, other=0.0).to(element_type)
    level = tl.load(where + s_row, mask=valid, other=0.0).to(element_type)
    below = tl.load(where + 2 * s_row, mask=valid, other=0.0).to(element_type)
    more = tl.load(bias + o, mask=o < OUT, other=0.0)[None, :]
    HALF: tl.constexpr = WIDTH // 2
    for block in range(tl.program_id(0), (num_strips + BLOCK - 1) // BLOCK, num_programs):
        strip, p, row, inside = locate_strips(block, k, num_strips, HEIGHT, WIDTH, IN, BLOCK)
        taps = x + p[:, None] * IN + (k - IN)[None, :]
        odd = (strip % 2)[:, None]
        line0 = load_row(taps - WIDTH * IN, inside, row - 1, HEIGHT)
        line1 = tl.load(taps, mask=inside, other=0.0)
        line2 = tl.load(taps + WIDTH * IN, mask=inside, other=0.0)
        line3 = tl.load(taps + 2 * WIDTH * IN, mask=inside, other=0.0)
        square = block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
        targets = (square // HALF * (2 * HALF) + square % HALF)[:, None] * OUT + o[None, :]
        out = (square < num_strips // 2)[:, None] & (o < OUT)[None, :]
        first = _encode_rank(tl.dot(line2, below, tl.dot(line1, level, tl.dot(line0, above))) + more, 3 - odd, element_type)
        second = _encode_rank(tl.dot(line3, below, tl.dot(line2, level, tl.dot(line1, above))) + more, 1 - odd, element_type)
        _store_pooled(tl.maximum(first, second), y, argmax, targets, out, BLOCK, COLUMNS)
        line4 = tl.load(taps + 3 * WIDTH * IN, mask=inside, other=0.0)
        line5 = load_row(taps + 4 * WIDTH * IN, inside, row + 4, HEIGHT)
        first = _encode_rank(tl.dot(line4, below, tl.dot(line3, level, tl.dot(line2, above))) + more, 3 - odd, element_type)
        second = _encode_rank(tl.dot(line5, below, tl.dot(line4, level, tl.dot(line3, above))) + more, 1 - odd, element_type)
        _store_pooled(tl.maximum(first, second), y, argmax, targets + HALF * OUT, out, BLOCK, COLUMNS)


@triton.jit
def convolve_pool_weight_grad(
    x, g, argmax, partials, num_strips, num_programs,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    TAPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partials[program]: the gradient of the filters, (o, row, column * IN + i), and then that of the bias, (o).

    Both are sums over the pixels of the program. The bias is a tap that is 1 everywhere: TAPS, a power of two, is never
    3 * IN, so there is room for it.
    """
    k, o = tl.arange(0, TAPS), tl.arange(0, COLUMNS)
    one = (k == 3 * IN)[None, :]
    above = tl.full((TAPS, COLUMNS), 0.0, tl.float32)
    level = tl.full((TAPS, COLUMNS), 0.0, tl.float32)
    below = tl.full((TAPS, COLUMNS), 0.0, tl.float32)
    HALF: tl.constexpr = WIDTH // 2
    for block in range(tl.program_id(0), (num_strips + BLOCK - 1) // BLOCK, num_programs):
        strip, p, row, inside = locate_strips(block, k, num_strips, HEIGHT, WIDTH, IN, BLOCK)
        taps = x + p[:, None] * IN + (k - IN)[None, :]
        q = strip // WIDTH * (2 * HALF) + strip % WIDTH // 2
        sources = q[:, None] * OUT + o[None, :]
        out = (strip < num_strips)[:, None] & (o < OUT)[None, :]
        odd = (strip % 2)[:, None]
        gradient = tl.load(g + sources, mask=out, other=0.0)
        winner = tl.load(argmax + sources, mask=out, other=4)
        g0 = tl.where(winner == odd, gradient, 0.0)
        g1 = tl.where(winner == 2 + odd, gradient, 0.0)
        gradient = tl.load(g + sources + HALF * OUT, mask=out, other=0.0)
        winner = tl.load(argmax + sources + HALF * OUT, mask=out, other=4)
        g2 = tl.where(winner == odd, gradient, 0.0)
        g3 = tl.where(winner == 2 + odd, gradient, 0.0)
        line = tl.trans(load_row(taps - WIDTH * IN, inside, row - 1, HEIGHT))
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
        line = tl.trans(load_row(taps + 4 * WIDTH * IN, inside, row + 4, HEIGHT))
        below = tl.dot(line, g3, below)
    partials += tl.program_id(0) * (9 * IN * OUT + OUT)
    where = partials + k[:, None] + o[None, :] * (9 * IN)
    valid = (k < 3 * IN)[:, None] & (o < OUT)[None, :]
    tl.store(where, above, mask=valid)
    tl.store(where + 3 * IN, level, mask=valid)
    tl.store(where + 6 * IN, below, mask=valid)
    where = partials + 9 * IN * OUT + k[:, None] * 0 + o[None, :]
    tl.store(where, level, mask=(k == 3 * IN)[:, None] & (o < OUT)[None, :])


@triton.jit
def _load_pooled(g, argmax, sources, inside):
    """The gradients of squares and their argmax; 4 outside of the image, so that they go nowhere."""
    return tl.load(g + sources, mask=inside, other=0.0), tl.load(argmax + sources, mask=inside, other=4)


@triton.jit
def convolve_pool_input_grad(
    g, argmax, weight, y, num_strips, num_programs, s_out, s_in, s_row, s_column,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    TAPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient y[p, o] of the images from those of the squares (IN channels). TAPS here: IN, rounded up."""
    i, o = tl.arange(0, TAPS), tl.arange(0, COLUMNS)
    valid = (i < IN)[:, None] & (o < OUT)[None, :]
    element_type = g.dtype.element_ty
    HALF: tl.constexpr = WIDTH // 2
    for block in range(tl.program_id(0), (num_strips + BLOCK - 1) // BLOCK, num_programs):
        strip = block * BLOCK + tl.arange(0, BLOCK)
        group, x = strip // WIDTH, strip % WIDTH
        row = group * 4 % HEIGHT
        total0 = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
        total1 = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
        total2 = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
        total3 = tl.full((BLOCK, COLUMNS), 0.0, tl.float32)
        for column in range(3):  # not unrolled, else registers run out
            where = weight + column * s_column + i[:, None] * s_in + o[None, :] * s_out
            above = tl.load(where, mask=valid, other=0.0).to(element_type)
            level = tl.load(where + s_row, mask=valid, other=0.0).to(element_type)
            below = tl.load(where + 2 * s_row, mask=valid, other=0.0).to(element_type)
            there = x + column - 1
            inside = ((there >= 0) & (there < WIDTH) & (strip < num_strips))[:, None] & (i < IN)[None, :]
            there = tl.maximum(there, 0)
            odd = (there % 2)[:, None]
            sources = (group * (2 * HALF) + there // 2)[:, None] * IN + i[None, :]
            gradient, winner = _load_pooled(g, argmax, sources - HALF * IN, inside & (row > 0)[:, None])
            line = tl.where(winner == 2 + odd, gradient, 0.0)
            total0 = tl.dot(line, above, total0)
            gradient, winner = _load_pooled(g, argmax, sources, inside)
            line = tl.where(winner == odd, gradient, 0.0)
            total0 = tl.dot(line, level, total0)
            total1 = tl.dot(line, above, total1)
            line = tl.where(winner == 2 + odd, gradient, 0.0)
            total0 = tl.dot(line, below, total0)
            total1 = tl.dot(line, level, total1)
            total2 = tl.dot(line, above, total2)
            gradient, winner = _load_pooled(g, argmax, sources + HALF * IN, inside)
            line = tl.where(winner == odd, gradient, 0.0)
            total1 = tl.dot(line, below, total1)
            total2 = tl.dot(line, level, total2)
            total3 = tl.dot(line, above, total3)
            line = tl.where(winner == 2 + odd, gradient, 0.0)
            total2 = tl.dot(line, below, total2)
            total3 = tl.dot(line, level, total3)
            gradient, winner = _load_pooled(g, argmax, sources + 2 * HALF * IN, inside & (row + 4 < HEIGHT)[:, None])
            line = tl.where(winner == odd, gradient, 0.0)
            total3 = tl.dot(line, below, total3)
        targets = y + (group * (4 * WIDTH) + x)[:, None] * OUT + o[None, :]
        out = (strip < num_strips)[:, None] & (o < OUT)[None, :]
        tl.store(targets, total0.to(y.dtype.element_ty), mask=out)
        tl.store(targets + WIDTH * OUT, total1.to(y.dtype.element_ty), mask=out)
        tl.store(targets + 2 * WIDTH * OUT, total2.to(y.dtype.element_ty), mask=out)
        tl.store(targets + 3 * WIDTH * OUT, total3.to(y.dtype.element_ty), mask=out)
