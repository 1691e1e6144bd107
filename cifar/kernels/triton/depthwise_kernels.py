"""The Triton kernels of depthwise 3 x 3 convolutions with BatchNorm before and after them.

A program works on some channels of many strips. A strip is a few neighbouring rows of one image. It is gone through column by
column: the last columns stay in registers, and the next one is loaded while the current one is worked on. So each value is
loaded little more than once for its nine products. Programs go through the strips in a fixed order and write the sums of their
own strips, so there are no atomic operations.

Sizes are not constants of the compiled code, so one compilation serves all layers of a network. Only the largest power of two
that divides the number of channels (UNIT) is a constant, because it says how wide a load may be.
"""

# ruff: noqa: RUF005 (Triton has no `*tuple`)
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from cifar.kernels.triton.batch_norm_kernels import activate, load_norm, mask_gradient
from cifar.kernels.triton.conv3x3_kernels import accumulate_moments, add, load_pivot


@triton.jit
def load_filters(weight, c, valid, like):
    """The nine taps of channels c, rounded as autocast rounds them, as float32 (1, channels)."""
    taps = ()
    for k in tl.static_range(9):
        value = tl.load(weight + c * 9 + k, mask=valid, other=0.0)
        taps = taps + (value.to(like.dtype.element_ty).to(tl.float32)[None, :],)
    return taps


@triton.jit
def load_column(
    x, column, row, here, height, width, size, scale, shift, ROWS: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr
):
    """ROWS values of a column of strips whose first value would lie at x, float32; zeros outside of the image.

    With NORM they go through BatchNorm and ACTIVATION.
    """
    values, bottom = (), tl.where(column < width, height, 0)
    for i in tl.static_range(ROWS):
        inside = here & ((row + i >= 0) & (row + i < bottom))[:, None]
        value = tl.load(x + (i * width + column) * size, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            value = tl.where(inside, activate(value * scale + shift, ACTIVATION), 0.0)
        values = values + (value,)
    return values


@triton.jit
def load_gradient_column(
    g, y, column, row, here, height, width, size, scale, shift, slope, offset, ROWS: tl.constexpr, ACTIVATION: tl.constexpr
):
    """As `load_column`: the gradient of the convolution's result y from the gradient g behind BatchNorm and ACTIVATION."""
    values, bottom = (), tl.where(column < width, height, 0)
    for i in tl.static_range(ROWS):
        inside = here & ((row + i >= 0) & (row + i < bottom))[:, None]
        gradient = tl.load(g + (i * width + column) * size, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(y + (i * width + column) * size, mask=inside, other=0.0).to(tl.float32)
        gradient = mask_gradient(gradient, value * scale + shift, ACTIVATION)
        values = values + (tl.where(inside, gradient * scale + (value * slope + offset), 0.0),)
    return values


@triton.jit
def load_raw_columns(x, column, row, here, height, width, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """ROWS values each of COLUMNS neighbouring columns, as they are stored."""
    values = ()
    for j in tl.static_range(COLUMNS):
        bottom = tl.where(column + j < width, height, 0)
        for i in tl.static_range(ROWS):
            inside = here & (row + i < bottom)[:, None]
            values = values + (tl.load(x + (i * width + column + j) * size, mask=inside, other=0.0),)
    return values


@triton.jit(do_not_specialize=["eps_in", "num_strips", "num_programs", "height", "width", "out_height", "out_width", "units"])
def depthwise_forward(
    x, weight, y, pivot, partials, moments_in, gamma_in, beta_in, eps_in,
    num_strips, num_programs, height, width, out_height, out_width, units,
    STRIDE: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y (N, out_height, out_width, C) of x (N, height, width, C); partials[program] (2, C): sums of y - pivot and its square.

    With NORM, x first goes through BatchNorm and ACTIVATION. ROWS: of y in a strip.
    """
    DOWN: tl.constexpr = (ROWS - 1) * STRIDE + 3
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    size = units * UNIT
    valid = c < size
    taps = load_filters(weight, c, valid, x)
    pivot_value = load_pivot(pivot, c, size)[None, :]
    scale, shift = pivot_value, pivot_value
    if NORM:
        _mean_in, _inv_std_in, scale, shift = load_norm(moments_in, gamma_in, beta_in, eps_in, c, size, valid)
    strips_of_image = (out_height + ROWS - 1) // ROWS
    zeros = tl.full((BLOCK, CHANNELS), 0.0, tl.float32)
    first, second = zeros, zeros
    for block in range(tl.program_id(1), (num_strips + BLOCK - 1) // BLOCK, num_programs):
        strip = block * BLOCK + tl.arange(0, BLOCK)
        image = strip // strips_of_image
        row_out = strip % strips_of_image * ROWS
        row = row_out * STRIDE - 1
        here = (strip < num_strips)[:, None] & valid[None, :]
        sources = x + ((image * height + row) * width)[:, None] * size + c[None, :]
        targets = y + ((image * out_height + row_out) * out_width)[:, None] * size + c[None, :]
        left = ()
        for i in tl.static_range(DOWN):  # noqa: B007 (Triton takes no `_` twice)
            left = left + (zeros,)
        middle = load_column(sources, 0, row, here, height, width, size, scale, shift, DOWN, NORM, ACTIVATION)
        right = load_column(sources, 1, row, here, height, width, size, scale, shift, DOWN, NORM, ACTIVATION)
        for j in range(out_width):
            after = STRIDE * j + 2
            next = load_column(sources, after, row, here, height, width, size, scale, shift, DOWN, NORM, ACTIVATION)
            if STRIDE == 2:
                second_next = load_column(
                    sources, after + 1, row, here, height, width, size, scale, shift, DOWN, NORM, ACTIVATION
                )
            for i in tl.static_range(ROWS):
                total = zeros
                for k in tl.static_range(3):
                    total += left[i * STRIDE + k] * taps[3 * k]
                    total += middle[i * STRIDE + k] * taps[3 * k + 1]
                    total += right[i * STRIDE + k] * taps[3 * k + 2]
                result = total.to(y.dtype.element_ty)
                out = here & (row_out + i < out_height)[:, None]
                tl.store(targets + (i * out_width + j) * size, result, mask=out)
                first, second = accumulate_moments(first, second, result, pivot_value, out)
            if STRIDE == 1:
                left, middle, right = middle, right, next
            else:
                left, middle, right = right, next, second_next
    targets = partials + tl.program_id(1) * (2 * size) + c
    tl.store(targets, tl.reduce(first, 0, add), mask=valid)
    tl.store(targets + size, tl.reduce(second, 0, add), mask=valid)


@triton.jit(
    do_not_specialize=[
        "eps",
        "eps_in",
        "pixels",
        "num_strips",
        "num_programs",
        "height",
        "width",
        "out_height",
        "out_width",
        "units",
    ]
)
def depthwise_backward(
    g, y, x, weight, h, partials, moments, gamma, beta, sums, eps, moments_in, gamma_in, beta_in, eps_in,
    pixels, num_strips, num_programs, height, width, out_height, out_width, units,
    STRIDE: tl.constexpr, NORM: tl.constexpr, ACTIVATION_IN: tl.constexpr, ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient through the BatchNorm and ACTIVATION after the convolution, and through the convolution.

    g: gradient after that activation; y: the convolution's result; sums (2, C): BatchNorm's of g. h: the gradient of the
    convolution's input, which with NORM is before ACTIVATION_IN. partials[program]: the filters' gradients (C, 9), and with
    NORM the sums of h and of h * (x - mean) / deviation, (2, C). ROWS: of x in a strip; with stride 2 they are even.
    """
    HALO: tl.constexpr = 2 - STRIDE  # rows and columns of y before those that lie at the pixel: one, or none for stride 2
    DOWN: tl.constexpr = ROWS // STRIDE + 3 - STRIDE
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    size = units * UNIT
    valid = c < size
    taps = load_filters(weight, c, valid, x)
    mean, inv_std, scale, shift = load_norm(moments, gamma, beta, eps, c, size, valid)
    # BatchNorm's gradient is scale * g + slope * y + offset
    slope = -scale * inv_std * tl.load(sums + size + c, mask=valid, other=0.0)[None, :] / pixels
    offset = -scale * tl.load(sums + c, mask=valid, other=0.0)[None, :] / pixels - slope * mean
    if NORM:
        mean_in, inv_std_in, scale_in, shift_in = load_norm(moments_in, gamma_in, beta_in, eps_in, c, size, valid)
    strips_of_image = (height + ROWS - 1) // ROWS
    zeros = tl.full((BLOCK, CHANNELS), 0.0, tl.float32)
    first, second = zeros, zeros
    filters = (zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros)
    for block in range(tl.program_id(1), (num_strips + BLOCK - 1) // BLOCK, num_programs):
        strip = block * BLOCK + tl.arange(0, BLOCK)
        image = strip // strips_of_image
        row = strip % strips_of_image * ROWS
        row_out = row // STRIDE - HALO
        here = (strip < num_strips)[:, None] & valid[None, :]
        place = ((image * out_height + row_out) * out_width)[:, None] * size + c[None, :]
        gs, ys = g + place, y + place
        place = ((image * height + row) * width)[:, None] * size + c[None, :]
        xs, hs = x + place, h + place
        left = ()
        if STRIDE == 1:
            for i in tl.static_range(DOWN):  # noqa: B007
                left = left + (zeros,)
        middle = load_gradient_column(
            gs, ys, 0, row_out, here, out_height, out_width, size, scale, shift, slope, offset, DOWN, ACTIVATION
        )
        right = load_gradient_column(
            gs, ys, 1, row_out, here, out_height, out_width, size, scale, shift, slope, offset, DOWN, ACTIVATION
        )
        values = load_raw_columns(xs, 0, row, here, height, width, size, ROWS, STRIDE)
        for column in range(0, width, STRIDE):
            next = load_gradient_column(
                gs, ys, column // STRIDE + 2, row_out, here, out_height, out_width, size,
                scale, shift, slope, offset, DOWN, ACTIVATION,
            )  # fmt: skip
            next_values = load_raw_columns(xs, column + STRIDE, row, here, height, width, size, ROWS, STRIDE)
            gradients = left + middle + right
            for j in tl.static_range(STRIDE):
                bottom = tl.where(column + j < width, height, 0)
                for i in tl.static_range(ROWS):
                    inside = here & (row + i < bottom)[:, None]
                    value = values[j * ROWS + i].to(tl.float32)
                    before, active = value, value
                    if NORM:
                        before = value * scale_in + shift_in
                        active = tl.where(inside, activate(before, ACTIVATION_IN), 0.0)
                    total = zeros
                    updated = ()
                    for k in tl.static_range(9):
                        if ((i + 1 - k // 3) % STRIDE == 0) and ((j + 1 - k % 3) % STRIDE == 0):
                            gradient = gradients[((j + 1 - k % 3) // STRIDE + HALO) * DOWN + (i + 1 - k // 3) // STRIDE + HALO]
                            total += gradient * taps[k]
                            updated = updated + (filters[k] + gradient * active,)
                        else:
                            updated = updated + (filters[k],)
                    filters = updated
                    if NORM:
                        total = tl.where(inside, mask_gradient(total, before, ACTIVATION_IN), 0.0)
                    result = total.to(h.dtype.element_ty)
                    tl.store(hs + (i * width + column + j) * size, result, mask=inside)
                    if NORM:
                        first += result.to(tl.float32)
                        second += result.to(tl.float32) * (value - mean_in)
            if STRIDE == 1:
                left = middle
            middle, right, values = right, next, next_values
    targets = partials + tl.program_id(1) * ((11 if NORM else 9) * size)
    for k in tl.static_range(9):
        tl.store(targets + c * 9 + k, tl.reduce(filters[k], 0, add), mask=valid)
    if NORM:
        tl.store(targets + 9 * size + c, tl.reduce(first, 0, add), mask=valid)
        tl.store(targets + 10 * size + c, tl.reduce(second * inv_std_in, 0, add), mask=valid)
