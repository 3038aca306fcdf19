"""Depthwise convolution in Triton, the kernels: forward, and one fused backward for dx, dW and dbias.

One kernel each serves both layouts, any stride, dilation and kernel size. A tile is BLOCK_P pixels by BLOCK_C
channels; pixels are counted through the batch, so that small maps fill a tile with several images. NCHW takes one
channel per tile (lanes along pixels), channels_last up to 64 (lanes along channels). What several taps read comes from
the first cache. Sizes of the map and the kernel are compile-time constants: divisions by them are multiplications.

Bytes, in passes over feature maps: forward reads x, writes y; backward reads x and dy, writes dx. Sums are float32
(float64 for float64): of dW, one per tile element and tap, over the tiles of a chunk, then over tile and chunks. Every
sum has a fixed order.

In the thin form ``weight`` is W_b, and a prologue makes the channels' ``W_t = W_b + E R`` in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOWHERE = tl.constexpr(-(2**30))  # a row that no kernel reaches


@triton.jit
def _coordinates(block, batch, BLOCK_P: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Image, row, column of the pixels of a tile, and which of them exist."""
    pixel = block * BLOCK_P + tl.arange(0, BLOCK_P)
    image = pixel // (HEIGHT * WIDTH)
    within = pixel % (HEIGHT * WIDTH)
    return image, within // WIDTH, within % WIDTH, image < batch


@triton.jit
def _within(index, SIZE: tl.constexpr):
    """0 <= index < SIZE, in one comparison."""
    return index.to(tl.uint32, bitcast=True) < SIZE


@triton.jit
def _thin_taps(
    basis, coordinates, factor, channels, real,
    TAPS: tl.constexpr, RANK: tl.constexpr, IDENTITY: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """W_t of channels of one refocus group, W_b + E R: a vector of channels per tap."""
    taps = ()
    for tap in tl.static_range(TAPS):
        total = tl.zeros(channels.shape, dtype=ACCUMULATOR)
        if IDENTITY:
            total += tl.load(basis + channels * TAPS + tap, mask=real, other=0).to(ACCUMULATOR)
        taps = taps + (total,)  # type: ignore[assignment]  # noqa: RUF005 (Triton has no unpacking)
    # Loads of all rows at once would take more registers than the convolution itself.
    for k in tl.range(0, RANK, loop_unroll_factor=3):
        along = tl.load(coordinates + channels * RANK + k, mask=real, other=0).to(ACCUMULATOR)
        added = ()
        for tap in tl.static_range(TAPS):
            entry = tl.load(factor + (k * TAPS + tap)).to(ACCUMULATOR)
            added = added + (taps[tap] + along * entry,)  # type: ignore[assignment]  # noqa: RUF005
        taps = added
    return taps


@triton.jit
def forward_kernel(
    x, weight, bias, y, batch, out_channels,
    x_image, x_channel, x_pixel, y_image, y_channel, y_pixel,
    MULTIPLIER: tl.constexpr, IN_H: tl.constexpr, IN_W: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, UNROLL_H: tl.constexpr, UNROLL_W: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y. Programs: (pixels of y in tiles, channels in tiles); strides count elements per image, channel and pixel."""
    image, i, j, exists = _coordinates(tl.program_id(0), batch, BLOCK_P, OUT_H, OUT_W)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channels < out_channels
    planes = x + image.to(tl.int64)[:, None] * x_image + (channels // MULTIPLIER).to(tl.int64)[None, :] * x_channel
    row, column = i * STRIDE_H - PAD_H, j * STRIDE_W - PAD_W
    # What tap (0, 0) sees; the others lie at fixed distances.
    corner = planes + ((row * IN_W + column) * x_pixel)[:, None]
    row = tl.where(exists, row, NOWHERE)
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACCUMULATOR)
    if HAS_BIAS:
        total += tl.load(bias + channels, mask=real, other=0).to(ACCUMULATOR)[None, :]
    for a in tl.range(0, KERNEL_H, loop_unroll_factor=UNROLL_H):
        for b in tl.range(0, KERNEL_W, loop_unroll_factor=UNROLL_W):
            seen = _within(row + a * DILATION_H, IN_H) & _within(column + b * DILATION_W, IN_W)
            from_ = corner + (a * DILATION_H * IN_W + b * DILATION_W) * x_pixel
            pixel = tl.load(from_, mask=seen[:, None] & real[None, :], other=0)
            tap = tl.load(weight + channels * (KERNEL_H * KERNEL_W) + a * KERNEL_W + b, mask=real, other=0)
            total += pixel.to(ACCUMULATOR) * tap.to(ACCUMULATOR)[None, :]
    to = y + image.to(tl.int64)[:, None] * y_image + channels.to(tl.int64)[None, :] * y_channel
    to += ((i * OUT_W + j) * y_pixel)[:, None]
    tl.store(to, total.to(y.dtype.element_ty), mask=exists[:, None] & real[None, :])


@triton.jit(do_not_specialize=["tiles_per_program"])  # one program for one tile and for several
def thin_forward_kernel(
    x, basis, bias, y, batch, out_channels, tiles, tiles_per_program,
    x_image, x_channel, x_pixel, y_image, y_channel, y_pixel,
    IN_H: tl.constexpr, IN_W: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACCUMULATOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    coordinates, factor, RANK: tl.constexpr, IDENTITY: tl.constexpr,
):  # fmt: skip
    """y in the thin form, one W_t for several tiles. Programs: (pixels of y in groups of tiles, channels in tiles)."""
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channels < out_channels
    taps = _thin_taps(
        basis, coordinates, factor, channels, real, KERNEL_H * KERNEL_W, RANK, IDENTITY, ACCUMULATOR
    )  # fmt: skip
    offset = tl.zeros((BLOCK_C,), dtype=ACCUMULATOR)
    if HAS_BIAS:
        offset += tl.load(bias + channels, mask=real, other=0).to(ACCUMULATOR)
    first = tl.program_id(0) * tiles_per_program
    for tile in range(first, tl.minimum(first + tiles_per_program, tiles)):
        image, i, j, exists = _coordinates(tile, batch, BLOCK_P, OUT_H, OUT_W)
        row, column = i * STRIDE_H - PAD_H, j * STRIDE_W - PAD_W
        corner = x + image.to(tl.int64)[:, None] * x_image + channels.to(tl.int64)[None, :] * x_channel
        corner += ((row * IN_W + column) * x_pixel)[:, None]
        row = tl.where(exists, row, NOWHERE)
        total = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACCUMULATOR) + offset[None, :]
        for a in tl.static_range(KERNEL_H):
            for b in tl.static_range(KERNEL_W):
                seen = _within(row + a * DILATION_H, IN_H) & _within(column + b * DILATION_W, IN_W)
                from_ = corner + (a * DILATION_H * IN_W + b * DILATION_W) * x_pixel
                pixel = tl.load(from_, mask=seen[:, None] & real[None, :], other=0)
                total += pixel.to(ACCUMULATOR) * taps[a * KERNEL_W + b][None, :]
        to = y + image.to(tl.int64)[:, None] * y_image + channels.to(tl.int64)[None, :] * y_channel
        to += ((i * OUT_W + j) * y_pixel)[:, None]
        tl.store(to, total.to(y.dtype.element_ty), mask=exists[:, None] & real[None, :])


@triton.jit
def _met(
    dy, corner, top, left, real, a, b, pixel_stride,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """The pixels of dy that pixels of x meet at tap (a, b), zero where there is none; and where there is one.

    (top, left), the padding added to the pixel of x, is what it meets at tap (0, 0) for stride 1, and ``corner`` its
    address; ``dy`` are the addresses of the planes.
    """
    top, left = top - a * DILATION_H, left - b * DILATION_W
    if STRIDE_H == 1 and STRIDE_W == 1:
        seen = _within(top, OUT_H) & _within(left, OUT_W)
        from_ = corner - (a * DILATION_H * OUT_W + b * DILATION_W) * pixel_stride
    else:
        i, j = top // STRIDE_H, left // STRIDE_W
        seen = _within(i, OUT_H) & _within(j, OUT_W) & (top % STRIDE_H == 0) & (left % STRIDE_W == 0)
        from_ = dy + ((i * OUT_W + j) * pixel_stride)[:, None]
    met = tl.load(from_, mask=seen[:, None] & real[None, :], other=0)
    return met.to(ACCUMULATOR), seen


@triton.jit
def backward_kernel(
    dy, x, weight, dx, partial, batch, out_channels, tiles, tiles_per_chunk,
    x_image, x_channel, x_pixel, y_image, y_channel, y_pixel,
    MULTIPLIER: tl.constexpr, IN_H: tl.constexpr, IN_W: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    TAP_ROWS: tl.constexpr, BIAS_TAP: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    coordinates=None, factor=None, RANK: tl.constexpr = 0, IDENTITY: tl.constexpr = True,
):  # fmt: skip
    """dx and the partial sums of dW and dbias, for one output channel per channel of x.

    Programs: (chunks of tiles of pixels of x, channels in tiles, kernel rows in blocks of TAP_ROWS). dx is None where
    it is not wanted or several blocks share the rows. partial: [chunks, taps + 1, out_channels], whose taps fill the
    last block of rows; the last of taps + 1 is for dbias, which is what the tap BIAS_TAP meets (-1: not computed).
    With coordinates and factor, the thin form: weight is W_b.
    """
    chunk = tl.program_id(0)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first_row = tl.program_id(2) * TAP_ROWS
    real = channels < out_channels
    x_channels = (channels // MULTIPLIER).to(tl.int64)[None, :] * x_channel
    taps_made = ()
    if coordinates is not None:
        taps_made = _thin_taps(
            weight, coordinates, factor, channels, real, KERNEL_H * KERNEL_W, RANK, IDENTITY, ACCUMULATOR
        )  # fmt: skip
    sums = ()
    for _ in tl.static_range(TAP_ROWS * KERNEL_W):
        sums = sums + (tl.zeros((BLOCK_P, BLOCK_C), dtype=ACCUMULATOR),)  # type: ignore[assignment]  # noqa: RUF005 (Triton has no unpacking)
    bias_sum = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACCUMULATOR)
    for tile in range(chunk * tiles_per_chunk, tl.minimum((chunk + 1) * tiles_per_chunk, tiles)):
        image, h, w, exists = _coordinates(tile, batch, BLOCK_P, IN_H, IN_W)
        here = image.to(tl.int64)[:, None] * x_image + x_channels + ((h * IN_W + w) * x_pixel)[:, None]
        inside = exists[:, None] & real[None, :]
        pixel = tl.load(x + here, mask=inside, other=0).to(ACCUMULATOR)
        planes = dy + image.to(tl.int64)[:, None] * y_image + channels.to(tl.int64)[None, :] * y_channel
        corner = planes + (((h + PAD_H) * OUT_W + w + PAD_W) * y_pixel)[:, None]
        top = tl.where(exists, h + PAD_H, NOWHERE)
        gradient = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACCUMULATOR)
        added = ()
        for a in tl.static_range(TAP_ROWS):
            for b in tl.static_range(KERNEL_W):
                met, seen = _met(
                    planes, corner, top, w + PAD_W, real, first_row + a, b, y_pixel,
                    OUT_H, OUT_W, STRIDE_H, STRIDE_W, DILATION_H, DILATION_W, ACCUMULATOR,
                )  # fmt: skip
                # Infinite pixels reach only the taps that see them: zero times infinity is not zero.
                added = added + (sums[a * KERNEL_W + b] + tl.where(seen[:, None], pixel, 0) * met,)  # type: ignore[assignment]  # noqa: RUF005
                if a * KERNEL_W + b == BIAS_TAP:
                    bias_sum += met
                if dx is not None:
                    if coordinates is not None:
                        gradient += met * taps_made[a * KERNEL_W + b][None, :]
                    else:
                        tap = tl.load(weight + channels * (KERNEL_H * KERNEL_W) + a * KERNEL_W + b, mask=real, other=0)
                        gradient += met * tap.to(ACCUMULATOR)[None, :]
        sums = added
        if dx is not None:
            tl.store(dx + here, gradient.to(dx.dtype.element_ty), mask=inside)
    taps = tl.num_programs(2) * TAP_ROWS * KERNEL_W
    to = partial + chunk * ((taps + 1) * out_channels) + channels
    for a in tl.static_range(TAP_ROWS):
        for b in tl.static_range(KERNEL_W):
            total = tl.sum(sums[a * KERNEL_W + b], axis=0)
            tl.store(to + ((first_row + a) * KERNEL_W + b) * out_channels, total, mask=real)
    if BIAS_TAP >= 0:
        tl.store(to + taps * out_channels, tl.sum(bias_sum, axis=0), mask=real)


@triton.jit
def input_gradient_kernel(
    dy, weight, dx, batch, in_channels,
    x_image, x_channel, x_pixel, y_image, y_channel, y_pixel,
    MULTIPLIER: tl.constexpr, IN_H: tl.constexpr, IN_W: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ACCUMULATOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx alone: for channel multipliers, and for kernels with more taps than sums fit into registers."""
    image, h, w, exists = _coordinates(tl.program_id(0), batch, BLOCK_P, IN_H, IN_W)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channels < in_channels
    images = dy + image.to(tl.int64)[:, None] * y_image
    top = tl.where(exists, h + PAD_H, NOWHERE)
    gradient = tl.zeros((BLOCK_P, BLOCK_C), dtype=ACCUMULATOR)
    for m in range(MULTIPLIER):
        out = channels * MULTIPLIER + m
        planes = images + out.to(tl.int64)[None, :] * y_channel
        corner = planes + (((h + PAD_H) * OUT_W + w + PAD_W) * y_pixel)[:, None]
        for a in range(KERNEL_H):
            for b in range(KERNEL_W):
                met, _ = _met(
                    planes, corner, top, w + PAD_W, real, a, b, y_pixel,
                    OUT_H, OUT_W, STRIDE_H, STRIDE_W, DILATION_H, DILATION_W, ACCUMULATOR,
                )  # fmt: skip
                tap = tl.load(weight + out * (KERNEL_H * KERNEL_W) + a * KERNEL_W + b, mask=real, other=0)
                gradient += met * tap.to(ACCUMULATOR)[None, :]
    to = dx + image.to(tl.int64)[:, None] * x_image + channels.to(tl.int64)[None, :] * x_channel
    to += ((h * IN_W + w) * x_pixel)[:, None]
    tl.store(to, gradient.to(dx.dtype.element_ty), mask=exists[:, None] & real[None, :])
