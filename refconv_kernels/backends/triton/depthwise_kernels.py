"""Depthwise convolution in Triton, the kernels: forward, and one fused backward for dx, dW and dbias.

One kernel each serves both layouts, any stride, dilation and kernel size; :mod:`.depthwise_tiles` has what they do with
a tile. Bytes, in passes over feature maps: forward reads x, writes y; backward reads x and dy, writes dx. Sums are
float32 (float64 for float64): of dW, one per lane and tap, over the tiles of a chunk, then over tile and chunks. Every
sum has a fixed order.

In the thin form ``weight`` is W_b, and a prologue makes the channels' ``W_t = W_b + E R`` in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from refconv_kernels.backends.triton.depthwise_tiles import (
    add_gradients,
    backward_tile,
    forward_tile,
    met_pixels,
    of_channels,
    store_strips,
    strips_of,
    tap_column,
    thin_taps,
)


@triton.jit(do_not_specialize=["tiles_per_program"])  # one program for one tile and for several
def forward_kernel(
    x, weight, bias, y, batch, out_channels, tiles, tiles_per_program,
    x_image, x_channel, x_pixel, y_image, y_channel, y_pixel,
    MULTIPLIER: tl.constexpr, IN_H: tl.constexpr, IN_W: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ROWS: tl.constexpr, UNROLL_W: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    coordinates=None, factor=None, RANK: tl.constexpr = 0, IDENTITY: tl.constexpr = True,
):  # fmt: skip
    """y. Programs: (tiles, several to each; channels in tiles); strides count elements per image, channel and pixel.

    With coordinates and factor, the thin form: weight is W_b, and a program makes its channels' W_t once.
    """
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = None if BLOCK_C == 1 else channels < out_channels
    x_channels = (channels // MULTIPLIER).to(tl.int64)[None, :] * x_channel
    taps = None
    if coordinates is not None:
        taps = thin_taps(
            weight, coordinates, factor, channels, real, KERNEL_H * KERNEL_W, RANK, IDENTITY, ACCUMULATOR
        )  # fmt: skip
    offset = tl.zeros((BLOCK_C,), dtype=ACCUMULATOR)
    if bias is not None:
        offset += of_channels(bias + channels, real).to(ACCUMULATOR)
    first = tl.program_id(0) * tiles_per_program
    for tile in range(first, tl.minimum(first + tiles_per_program, tiles)):
        forward_tile(
            tile, x, y, batch, channels, x_channels, real, offset, weight, taps,
            x_image, x_pixel, y_image, y_channel, y_pixel,
            IN_H, IN_W, OUT_H, OUT_W, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W,
            ROWS, UNROLL_W, ACCUMULATOR, BLOCK_P, BLOCK_C,
        )  # fmt: skip


@triton.jit
def backward_kernel(
    dy, x, weight, dx, partial, batch, out_channels, tiles, tiles_per_chunk,
    x_image, x_channel, x_pixel, y_image, y_channel, y_pixel,
    MULTIPLIER: tl.constexpr, IN_H: tl.constexpr, IN_W: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ROWS: tl.constexpr, LOW: tl.constexpr, COUNT: tl.constexpr, TAP_ROWS: tl.constexpr, BIAS_TAP: tl.constexpr,
    ACCUMULATOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    coordinates=None, factor=None, RANK: tl.constexpr = 0, IDENTITY: tl.constexpr = True,
):  # fmt: skip
    """dx and the partial sums of dW and dbias, for one output channel per channel of x.

    Programs: (chunks of tiles of strips of x, channels in tiles, kernel rows in blocks of TAP_ROWS). dx is None where
    it is not wanted or several blocks share the rows. partial: [chunks, taps + 1, out_channels], whose taps fill the
    last block of rows; the last of taps + 1 is for dbias, which is what the tap BIAS_TAP meets (-1: not computed).
    With coordinates and factor, the thin form: weight is W_b.
    """
    chunk = tl.program_id(0)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first_row = tl.program_id(2) * TAP_ROWS
    real = None if BLOCK_C == 1 else channels < out_channels
    x_channels = (channels // MULTIPLIER).to(tl.int64)[None, :] * x_channel
    taps = None
    if coordinates is not None:
        taps = thin_taps(
            weight, coordinates, factor, channels, real, KERNEL_H * KERNEL_W, RANK, IDENTITY, ACCUMULATOR
        )  # fmt: skip
    sums = ()
    for _ in tl.static_range(TAP_ROWS * KERNEL_W + 1):
        sums = sums + (tl.zeros((BLOCK_P, BLOCK_C), dtype=ACCUMULATOR),)  # type: ignore[assignment]  # noqa: RUF005
    for tile in range(chunk * tiles_per_chunk, tl.minimum((chunk + 1) * tiles_per_chunk, tiles)):
        sums = backward_tile(
            tile, dy, x, dx, batch, channels, x_channels, real, first_row, weight, taps, sums,
            x_image, x_pixel, y_image, y_channel, y_pixel,
            IN_H, IN_W, OUT_H, OUT_W, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W,
            ROWS, LOW, COUNT, TAP_ROWS, BIAS_TAP, ACCUMULATOR, BLOCK_P, BLOCK_C,
        )  # fmt: skip
    taps_in_all = tl.num_programs(2) * TAP_ROWS * KERNEL_W
    to = partial + chunk * ((taps_in_all + 1) * out_channels) + channels
    for b in tl.static_range(KERNEL_W):
        for a in tl.static_range(TAP_ROWS):
            total = tl.sum(sums[b * TAP_ROWS + a], axis=0)
            tl.store(to + ((first_row + a) * KERNEL_W + b) * out_channels, total, mask=real)
    if BIAS_TAP >= 0:
        tl.store(to + taps_in_all * out_channels, tl.sum(sums[TAP_ROWS * KERNEL_W], axis=0), mask=real)


@triton.jit
def input_gradient_kernel(
    dy, weight, dx, batch, in_channels,
    x_image, x_channel, x_pixel, y_image, y_channel, y_pixel,
    MULTIPLIER: tl.constexpr, IN_H: tl.constexpr, IN_W: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ROWS: tl.constexpr, LOW: tl.constexpr, COUNT: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx alone: for channel multipliers, and for kernels with more taps than sums fit into registers."""
    image, strip, w, exists = strips_of(tl.program_id(0), batch, BLOCK_P, IN_H, IN_W, ROWS)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = None if BLOCK_C == 1 else channels < in_channels
    images = dy + image.to(tl.int64)[:, None] * y_image
    top = strip * (ROWS // STRIDE_H) + LOW
    gradients = ()
    for _ in tl.static_range(ROWS):
        gradients = gradients + (tl.zeros((BLOCK_P, BLOCK_C), dtype=ACCUMULATOR),)  # type: ignore[assignment]  # noqa: RUF005
    for m in range(MULTIPLIER):
        out = channels * MULTIPLIER + m
        planes = images + out.to(tl.int64)[None, :] * y_channel
        for b in range(KERNEL_W):
            met, _seen = met_pixels(
                planes, top, w, exists, real, b, y_pixel, OUT_H, OUT_W, STRIDE_W, PAD_W, DILATION_W, COUNT, ACCUMULATOR
            )  # fmt: skip
            column = tap_column(weight, None, out, real, b, KERNEL_H, KERNEL_W, ACCUMULATOR)
            gradients = add_gradients(gradients, met, column, KERNEL_H, STRIDE_H, PAD_H, DILATION_H, ROWS, LOW)
    to = dx + image.to(tl.int64)[:, None] * x_image + channels.to(tl.int64)[None, :] * x_channel
    to += ((strip * ROWS * IN_W + w) * x_pixel)[:, None]
    store_strips(to, gradients, strip, exists, real, x_pixel, IN_H, IN_W, ROWS)
