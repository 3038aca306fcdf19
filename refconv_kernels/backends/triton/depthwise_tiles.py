"""Depthwise convolution in Triton, what a tile computes.

A lane computes a strip: ROWS pixels below one another, which share what they see, where they stand, and what lies
beyond the left and right edge. A tile is BLOCK_P strips by BLOCK_C channels; strips are counted along rows, then
through the batch, so that neighbouring lanes read neighbouring pixels and small maps fill a tile with several images.
NCHW takes one channel per tile (lanes along strips), channels_last up to 64 (lanes along channels). Sizes of the map
and the kernel are compile-time constants: divisions by them are multiplications, and which pixels of a strip meet which
taps is known before a kernel runs, for any stride and dilation.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from refconv_kernels.backends.triton import INTERPRETED

COMPILED = tl.constexpr(not INTERPRETED)
NOWHERE = tl.constexpr(-(2**30))  # a column that no kernel reaches


@triton.jit
def strips_of(block, batch, BLOCK_P: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Image, number within a column, and column of the strips of a tile; and which of them exist."""
    strip = block * BLOCK_P + tl.arange(0, BLOCK_P)
    per_image: tl.constexpr = (HEIGHT + ROWS - 1) // ROWS * WIDTH
    within = strip % per_image
    return strip // per_image, within // WIDTH, within % WIDTH, strip // per_image < batch


@triton.jit
def _within(index, SIZE: tl.constexpr):
    """0 <= index < SIZE, in one comparison."""
    return index.to(tl.uint32, bitcast=True) < SIZE


@triton.jit
def _wanted(seen, real):
    """The mask of a tile: strips that are ``seen``, of channels that are ``real`` (None: all)."""
    if real is None:
        wanted = seen[:, None]
    else:
        wanted = seen[:, None] & real[None, :]
    return wanted


@triton.jit
def of_channels(address, real):
    """A value per channel."""
    if real is None:
        values = tl.load(address)
    else:
        values = tl.load(address, mask=real, other=0)
    return values


@triton.jit
def _column(
    corner, top, exists, real, pixel_stride,
    COUNT: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """COUNT pixels from row ``top`` on downwards, zero beyond the map: a tuple of tiles. ``corner``: the first ones."""
    pixels = ()
    for row in tl.static_range(COUNT):
        seen = exists & _within(top + row, HEIGHT)
        pixel = tl.load(corner + row * WIDTH * pixel_stride, mask=_wanted(seen, real), other=0)
        pixels = pixels + (pixel.to(ACCUMULATOR),)  # type: ignore[assignment]  # noqa: RUF005 (Triton has no unpacking)
    return pixels


@triton.jit
def thin_taps(
    basis, coordinates, factor, channels, real,
    TAPS: tl.constexpr, RANK: tl.constexpr, IDENTITY: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """W_t of channels of one refocus group, W_b + E R: a vector of channels per tap."""
    taps = ()
    for tap in tl.static_range(TAPS):
        total = tl.zeros(channels.shape, dtype=ACCUMULATOR)
        if IDENTITY:
            total += of_channels(basis + channels * TAPS + tap, real).to(ACCUMULATOR)
        taps = taps + (total,)  # type: ignore[assignment]  # noqa: RUF005
    # Loads of all rows at once would take more registers than the convolution itself.
    for k in tl.range(0, RANK, loop_unroll_factor=3):
        along = of_channels(coordinates + channels * RANK + k, real).to(ACCUMULATOR)
        added = ()
        for tap in tl.static_range(TAPS):
            entry = tl.load(factor + (k * TAPS + tap)).to(ACCUMULATOR)
            added = added + (taps[tap] + along * entry,)  # type: ignore[assignment]  # noqa: RUF005
        taps = added
    return taps


@triton.jit
def tap_column(
    weight, taps, channels, real, b, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, ACCUMULATOR: tl.constexpr
):  # fmt: skip
    """Column ``b`` of the kernels, a vector of channels per tap: of those in registers or, if None, from memory."""
    column = ()
    for a in tl.static_range(KERNEL_H):
        if taps is not None:
            tap = taps[a * KERNEL_W + b]
        else:
            tap = of_channels(weight + channels * (KERNEL_H * KERNEL_W) + a * KERNEL_W + b, real)
            tap = tap.to(ACCUMULATOR)
        column = column + (tap,)  # type: ignore[assignment]  # noqa: RUF005
    return column


@triton.jit
def store_strips(
    corner, strips, strip, exists, real, pixel_stride, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Write the pixels of strips; ``corner``: where the first of each goes."""
    for r in tl.static_range(ROWS):
        inside = exists & _within(strip * ROWS + r, HEIGHT)
        to = corner + r * WIDTH * pixel_stride
        tl.store(to, strips[r].to(corner.dtype.element_ty), mask=_wanted(inside, real))


@triton.jit
def _opaque(value):
    """The same value, of which the compiler knows nothing, at no cost.

    LLVM packs neighbouring sums into vectors, which gains nothing on NVIDIA's devices and which it could not make code
    of for 3x3 kernels with stride 2 (Triton 3.9, sm_90 and sm_100: the process is aborted).
    """
    if COMPILED and is_cuda():
        if value.dtype == tl.float64:
            value = tl.inline_asm_elementwise("mov.f64 $0, $1;", "=d,d", [value], tl.float64, is_pure=True, pack=1)
        else:
            value = tl.inline_asm_elementwise("mov.f32 $0, $1;", "=f,f", [value], tl.float32, is_pure=True, pack=1)
    return value


# --- forward -------------------------------------------------------------------------------------------------


@triton.jit
def _add_column(
    totals, corner, top, left, b, real, weight, taps, channels, x_pixel,
    IN_H: tl.constexpr, IN_W: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ROWS: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """The pixels of strips of y plus what column ``b`` of the kernels sees."""
    COUNT: tl.constexpr = (ROWS - 1) * STRIDE_H + (KERNEL_H - 1) * DILATION_H + 1
    seen = _within(left + b * DILATION_W, IN_W)
    pixels = _column(corner + b * DILATION_W * x_pixel, top, seen, real, x_pixel, COUNT, IN_H, IN_W, ACCUMULATOR)
    column = tap_column(weight, taps, channels, real, b, KERNEL_H, KERNEL_W, ACCUMULATOR)
    added = ()
    for r in tl.static_range(ROWS):
        total = totals[r]
        for a in tl.static_range(KERNEL_H):
            total = _opaque(total + pixels[r * STRIDE_H + a * DILATION_H] * column[a][None, :])
        added = added + (total,)  # type: ignore[assignment]  # noqa: RUF005
    return added


@triton.jit
def forward_tile(
    tile, x, y, batch, channels, x_channels, real, offset, weight, taps,
    x_image, x_pixel, y_image, y_channel, y_pixel,
    IN_H: tl.constexpr, IN_W: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ROWS: tl.constexpr, UNROLL_W: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of y. ``taps`` are the kernels in registers; None: they are ``weight``."""
    image, strip, j, exists = strips_of(tile, batch, BLOCK_P, OUT_H, OUT_W, ROWS)
    top, left = strip * (ROWS * STRIDE_H) - PAD_H, j * STRIDE_W - PAD_W
    # What tap (0, 0) of the first pixel sees; everything else lies at fixed distances.
    corner = x + image.to(tl.int64)[:, None] * x_image + x_channels + ((top * IN_W + left) * x_pixel)[:, None]
    left = tl.where(exists, left, NOWHERE)
    totals = ()
    for _ in tl.static_range(ROWS):
        totals = totals + (tl.zeros((BLOCK_P, BLOCK_C), dtype=ACCUMULATOR) + offset[None, :],)  # type: ignore[assignment]  # noqa: RUF005
    if taps is not None:
        for b in tl.static_range(KERNEL_W):
            totals = _add_column(
                totals, corner, top, left, b, real, weight, taps, channels, x_pixel,
                IN_H, IN_W, KERNEL_H, KERNEL_W, STRIDE_H, DILATION_H, DILATION_W, ROWS, ACCUMULATOR,
            )  # fmt: skip
    else:
        for b in tl.range(0, KERNEL_W, loop_unroll_factor=UNROLL_W):
            totals = _add_column(
                totals, corner, top, left, b, real, weight, taps, channels, x_pixel,
                IN_H, IN_W, KERNEL_H, KERNEL_W, STRIDE_H, DILATION_H, DILATION_W, ROWS, ACCUMULATOR,
            )  # fmt: skip
    to = y + image.to(tl.int64)[:, None] * y_image + channels.to(tl.int64)[None, :] * y_channel
    to += ((strip * ROWS * OUT_W + j) * y_pixel)[:, None]
    store_strips(to, totals, strip, exists, real, y_pixel, OUT_H, OUT_W, ROWS)


# --- backward ------------------------------------------------------------------------------------------------
# Tap a of pixel r of a strip of x meets pixel (PAD_H + r - a * DILATION_H) / STRIDE_H of a column of dy that begins
# with the strip, if that is whole: ROWS spans whole strides, so it is known here which do. LOW is the least of them,
# COUNT how many there are.


@triton.jit
def met_pixels(
    planes, top, w, exists, real, b, pixel_stride,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, STRIDE_W: tl.constexpr, PAD_W: tl.constexpr, DILATION_W: tl.constexpr,
    COUNT: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """The pixels of dy that strips of x meet at column ``b`` of the kernels, from row ``top`` on; and where they do."""
    left = w + PAD_W - b * DILATION_W
    seen = exists
    if STRIDE_W > 1:
        seen = seen & (left % STRIDE_W == 0)
        left = left // STRIDE_W
    seen = seen & _within(left, OUT_W)
    corner = planes + ((top * OUT_W + left) * pixel_stride)[:, None]
    return _column(corner, top, seen, real, pixel_stride, COUNT, OUT_H, OUT_W, ACCUMULATOR), seen


@triton.jit
def add_gradients(
    gradients, met, column, KERNEL_H: tl.constexpr, STRIDE_H: tl.constexpr, PAD_H: tl.constexpr,
    DILATION_H: tl.constexpr, ROWS: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """The pixels of strips of dx plus what comes through one column of the kernels."""
    added = ()
    for r in tl.static_range(ROWS):
        gradient = gradients[r]
        for a in tl.static_range(KERNEL_H):
            if (PAD_H + r - a * DILATION_H) % STRIDE_H == 0:
                gradient += met[(PAD_H + r - a * DILATION_H) // STRIDE_H - LOW] * column[a][None, :]
                gradient = _opaque(gradient)
        added = added + (gradient,)  # type: ignore[assignment]  # noqa: RUF005
    return added


@triton.jit
def backward_tile(
    tile, dy, x, dx, batch, channels, x_channels, real, first_row, weight, taps, sums,
    x_image, x_pixel, y_image, y_channel, y_pixel,
    IN_H: tl.constexpr, IN_W: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ROWS: tl.constexpr, LOW: tl.constexpr, COUNT: tl.constexpr, TAP_ROWS: tl.constexpr, BIAS_TAP: tl.constexpr,
    ACCUMULATOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of dx (None: not wanted). Returns ``sums``, TAP_ROWS of each column and the bias', with its share added.

    ``taps`` are the kernels in registers; None: they are ``weight``. The sums are those of the taps from ``first_row``
    on, which spans whole strides.
    """
    image, strip, w, exists = strips_of(tile, batch, BLOCK_P, IN_H, IN_W, ROWS)
    here = image.to(tl.int64)[:, None] * x_image + x_channels + ((strip * ROWS * IN_W + w) * x_pixel)[:, None]
    pixels = _column(x + here, strip * ROWS, exists, real, x_pixel, ROWS, IN_H, IN_W, ACCUMULATOR)
    planes = dy + image.to(tl.int64)[:, None] * y_image + channels.to(tl.int64)[None, :] * y_channel
    top = strip * (ROWS // STRIDE_H) + LOW - first_row * DILATION_H // STRIDE_H
    gradients = ()
    for _ in tl.static_range(ROWS):
        gradients = gradients + (tl.zeros((BLOCK_P, BLOCK_C), dtype=ACCUMULATOR),)  # type: ignore[assignment]  # noqa: RUF005
    bias_sum = sums[TAP_ROWS * KERNEL_W]
    added = ()
    for b in tl.static_range(KERNEL_W):
        met, seen = met_pixels(
            planes, top, w, exists, real, b, y_pixel, OUT_H, OUT_W, STRIDE_W, PAD_W, DILATION_W, COUNT, ACCUMULATOR
        )  # fmt: skip
        for a in tl.static_range(TAP_ROWS):
            total = sums[b * TAP_ROWS + a]
            for r in tl.static_range(ROWS):
                if (PAD_H + r - a * DILATION_H) % STRIDE_H == 0:
                    other = met[(PAD_H + r - a * DILATION_H) // STRIDE_H - LOW]
                    both = seen & _within(top + ((PAD_H + r - a * DILATION_H) // STRIDE_H - LOW), OUT_H)
                    if IN_H % ROWS != 0:
                        both = both & _within(strip * ROWS + r, IN_H)
                        other = tl.where(both[:, None], other, 0)
                    # Infinite pixels reach only the taps that see them: zero times infinity is not zero.
                    total = _opaque(total + tl.where(both[:, None], pixels[r], 0) * other)
                    if a * KERNEL_W + b == BIAS_TAP:
                        bias_sum += other
            added = added + (total,)  # type: ignore[assignment]  # noqa: RUF005
        if dx is not None:
            column = tap_column(weight, taps, channels, real, b, KERNEL_H, KERNEL_W, ACCUMULATOR)
            gradients = add_gradients(gradients, met, column, KERNEL_H, STRIDE_H, PAD_H, DILATION_H, ROWS, LOW)
    if dx is not None:
        store_strips(dx + here, gradients, strip, exists, real, x_pixel, IN_H, IN_W, ROWS)
    return added + (bias_sum,)  # noqa: RUF005
