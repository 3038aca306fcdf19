"""Depthwise convolution in Triton: forward, and one fused backward for dx, dW and dbias.

One kernel each serves both layouts, any stride, dilation and kernel size. A tile is BLOCK_P pixels by BLOCK_C
channels; pixels are counted through the batch, so that small maps fill a tile with several images. NCHW takes one
channel per tile (lanes along pixels), channels_last up to 64 (lanes along channels). What several taps read comes from
the first cache. Sizes of the map and the kernel are compile-time constants: divisions by them are multiplications.

Bytes, in passes over feature maps: forward reads x, writes y; backward reads x and dy, writes dx. Sums are float32
(float64 for float64): of dW, one per tile element and tap, over the tiles of a chunk, then over tile and chunks. Every
sum has a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refconv_kernels.backends.triton.launch import (
    accumulator,
    device_of,
    power_of_2,
    registers,
)
from refconv_kernels.geometry import output_format, output_size

_UNROLLED_COLUMNS = 7  # taps of a row whose loads may be under way together
_FUSED_TAPS = 25  # sums of dW in registers; beyond, dx and dW are two launches, dW's by kernel rows
NOWHERE = tl.constexpr(-(2**30))  # a row that no kernel reaches
_PROGRAMS = 2048  # of a backward: enough for every multiprocessor, few enough for short partial sums


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
):  # fmt: skip
    """dx and the partial sums of dW and dbias, for one output channel per channel of x.

    Programs: (chunks of tiles of pixels of x, channels in tiles, kernel rows in blocks of TAP_ROWS). dx is None where
    it is not wanted or several blocks share the rows. partial: [chunks, taps + 1, out_channels], whose taps fill the
    last block of rows; the last of taps + 1 is for dbias, which is what the tap BIAS_TAP meets (-1: not computed).
    """
    chunk = tl.program_id(0)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first_row = tl.program_id(2) * TAP_ROWS
    real = channels < out_channels
    x_channels = (channels // MULTIPLIER).to(tl.int64)[None, :] * x_channel
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


# --- launches ------------------------------------------------------------------------------------------------


def _strides(feature_map: Tensor) -> tuple[int, int, int]:
    """Elements from one image, channel and pixel to the next, of a map that is NCHW or channels_last."""
    batch_stride, channel_stride, _, column_stride = feature_map.stride()
    return batch_stride, channel_stride, column_stride


def _blocks(channels: int, channels_last: bool, elements: int | None = None) -> tuple[int, int]:
    """BLOCK_P and BLOCK_C of a tile of that many elements: by default 4 per thread in NCHW, 8 in channels_last."""
    block_c = min(power_of_2(channels), 64) if channels_last else 1
    return (elements or (1024 if channels_last else 512)) // block_c, block_c


def _constants(
    input: Tensor, weight: Tensor, out: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> dict[str, int]:
    values = {
        "IN": input.shape[2:], "OUT": out.shape[2:], "KERNEL": weight.shape[2:],
        "STRIDE": stride, "PAD": padding, "DILATION": dilation,
    }  # fmt: skip
    sizes = {f"{name}_{axis}": int(pair[d]) for name, pair in values.items() for d, axis in enumerate("HW")}
    return {"MULTIPLIER": weight.shape[0] // input.shape[1], **sizes}


def forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """``y`` ``[B, C_out, H_out, W_out]``; arguments as in the operator ``grouped_conv2d``."""
    layout = output_format(input, weight)
    x, weight = input.contiguous(memory_format=layout), weight.contiguous()
    size = output_size(input, weight, stride, padding, dilation)
    y = torch.empty(
        (input.shape[0], weight.shape[0], *size), dtype=input.dtype, device=input.device, memory_format=layout
    )
    if y.numel() == 0:
        return y
    block_p, block_c = _blocks(y.shape[1], layout is torch.channels_last)
    grid = (triton.cdiv(y.shape[0] * size[0] * size[1], block_p), triton.cdiv(y.shape[1], block_c))
    with device_of(x):
        forward_kernel[grid](
            x, weight, bias, y, y.shape[0], y.shape[1], *_strides(x), *_strides(y),
            **_constants(x, weight, y, stride, padding, dilation),
            HAS_BIAS=bias is not None, UNROLL_H=weight.shape[2] if block_c == 1 and weight[0].numel() <= 9 else 1,
            UNROLL_W=weight.shape[3] if weight.shape[3] <= _UNROLLED_COLUMNS else 4,
            ACCUMULATOR=accumulator(x), BLOCK_P=block_p, BLOCK_C=block_c, **registers(x, 168),
        )  # fmt: skip
    return y


def _bias_tap(constants: dict[str, int]) -> int:
    """A tap at which the pixels of x meet every pixel of dy once; -1 when there is none."""
    tap = 0
    for axis in "HW":
        pad, dilation = constants[f"PAD_{axis}"], constants[f"DILATION_{axis}"]
        steps, rest = divmod(pad, dilation)
        reach = (constants[f"OUT_{axis}"] - 1) * constants[f"STRIDE_{axis}"]
        if rest or steps >= constants[f"KERNEL_{axis}"] or reach >= constants[f"IN_{axis}"]:
            return -1
        tap = tap * constants[f"KERNEL_{axis}"] + steps
    return tap


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx, dW, dbias)``, empty where not needed; arguments as in the operator ``grouped_conv2d_backward``."""
    layout = output_format(input, weight)
    dy, x = grad_output.contiguous(memory_format=layout), input.contiguous(memory_format=layout)
    weight = weight.contiguous()
    dx = torch.empty_like(x) if need_input else x.new_empty(0)
    grad_weight = torch.empty_like(weight) if need_weight else weight.new_empty(0)
    grad_bias = weight.new_empty(weight.shape[0] if need_bias else 0)
    constants = _constants(x, weight, dy, stride, padding, dilation)
    if dy.numel() == 0 or x.numel() == 0:
        return dx.zero_(), grad_weight.zero_(), grad_bias.zero_()

    taps, kernel_w = weight[0].numel(), weight.shape[3]
    fused = constants["MULTIPLIER"] == 1 and taps <= _FUSED_TAPS and need_weight
    strides = (*_strides(x), *_strides(dy))
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    with device_of(x):
        if need_input and not fused:
            block_p, block_c = _blocks(x.shape[1], layout is torch.channels_last)
            grid = (triton.cdiv(pixels, block_p), triton.cdiv(x.shape[1], block_c))
            input_gradient_kernel[grid](
                dy, weight, dx, x.shape[0], x.shape[1], *strides, **constants,
                ACCUMULATOR=accumulator(x), BLOCK_P=block_p, BLOCK_C=block_c, **registers(x, 168),
            )  # fmt: skip
        if need_weight:
            tap_rows = weight.shape[2] if taps <= _FUSED_TAPS else max(1, _FUSED_TAPS // kernel_w)
            bias_tap = _bias_tap(constants) if need_bias and tap_rows == weight.shape[2] else -1
            # Every element of a tile has a lane of every sum: 4 of them per thread and tap, or 2, or 1.
            few = taps <= 9 and x.dtype != torch.float64
            elements, most = (512, 168) if few else (256 if x.dtype != torch.float64 else 128, 255)
            block_p, block_c = _blocks(dy.shape[1], layout is torch.channels_last, elements)
            tiles, channel_blocks = triton.cdiv(pixels, block_p), triton.cdiv(dy.shape[1], block_c)
            row_blocks = triton.cdiv(weight.shape[2], tap_rows)
            per_chunk = triton.cdiv(tiles, max(1, _PROGRAMS // (channel_blocks * row_blocks)))
            chunks = triton.cdiv(tiles, per_chunk)
            partial = torch.empty(
                (chunks, row_blocks * tap_rows * kernel_w + 1, dy.shape[1]),
                dtype=torch.promote_types(x.dtype, torch.float32),
                device=x.device,
            )
            backward_kernel[(chunks, channel_blocks, row_blocks)](
                dy, x, weight, dx if fused and need_input else None, partial, x.shape[0], dy.shape[1], tiles, per_chunk,
                *strides, **constants,
                TAP_ROWS=tap_rows, BIAS_TAP=bias_tap,
                ACCUMULATOR=accumulator(x), BLOCK_P=block_p, BLOCK_C=block_c, **registers(x, most),
            )  # fmt: skip
            totals = partial.sum(0)
            grad_weight.copy_(totals[:taps].t().reshape(weight.shape))
            if bias_tap >= 0:
                grad_bias.copy_(totals[-1])
                return dx, grad_weight, grad_bias
    if need_bias:
        torch.sum(dy, (0, 2, 3), out=grad_bias)
    return dx, grad_weight, grad_bias
