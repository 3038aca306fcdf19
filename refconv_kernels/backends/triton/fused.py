"""Both steps of a depthwise RefConv in one Triton kernel each way, for small NCHW maps of many channels.

A program owns one channel. Forward, its prologue makes the channel's ``W_t`` from its row of ``W_r`` and keeps it in
registers; backward, its epilogue turns the channel's ``dW`` into its row of ``dW_r``. Rows of ``W_r`` are read or
written once, as by the separate kernels; what is saved are launches and the way of ``dW`` through memory. That pays
where one program per channel is enough to fill the device and no channel has many pixels: see :func:`fuses`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refconv_kernels.backends.triton.depthwise_tiles import backward_tile, forward_tile
from refconv_kernels.backends.triton.launch import (
    accumulator,
    bias_tap,
    constants,
    device_of,
    met_rows,
    options,
    power_of_2,
    strides,
    strip_rows,
)
from refconv_kernels.backends.triton.refocus import _seen
from refconv_kernels.geometry import output_format, output_size

FEWEST_CHANNELS = 512  # programs, of four warps each: three to eight for every multiprocessor
MOST_PIXELS = 8192  # of one channel: as many bytes as a row of W_r or two
MOST_TAPS = 9  # that a program keeps in registers, with their sums
_BLOCK_P, _BLOCK_L = 128, 256  # strips, entries of a row of W_r


def fuses(input: Tensor, weight: Tensor) -> bool:
    """Whether both steps of this problem run as one kernel each way."""
    pixels = input.shape[0] * input.shape[2] * input.shape[3]
    fits = weight.shape[0] == input.shape[1] >= FEWEST_CHANNELS and pixels <= MOST_PIXELS
    layout = output_format(input, weight)
    return fits and weight.shape[2] * weight.shape[3] <= MOST_TAPS and layout is torch.contiguous_format and pixels > 0


@triton.jit
def fused_forward_kernel(
    x, basis, refocus, bias, y, transformed, batch, group_size, tiles,
    x_image, x_channel, x_pixel, y_image, y_channel, y_pixel,
    MULTIPLIER: tl.constexpr, IN_H: tl.constexpr, IN_W: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    MAP: tl.constexpr, IDENTITY: tl.constexpr, ROWS: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """y and W_t. Programs: the channels."""
    channel = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    first = channel // group_size * group_size
    pixel = tl.arange(0, BLOCK_S)
    drawn = pixel < KERNEL_H * KERNEL_W
    length = group_size * (MAP * MAP)
    products = tl.zeros((BLOCK_L, BLOCK_S), dtype=ACCUMULATOR)
    for start in range(0, length, BLOCK_L):
        entry = start + tl.arange(0, BLOCK_L)
        valid = entry < length
        weight = tl.load(refocus + channel * length + entry, mask=valid, other=0)
        seen = _seen(
            basis, (first + entry // (MAP * MAP))[:, None], pixel[None, :], (entry % (MAP * MAP))[:, None],
            KERNEL_H, KERNEL_W, MAP, valid[:, None] & drawn[None, :],
        )  # fmt: skip
        products += weight.to(ACCUMULATOR)[:, None] * seen.to(ACCUMULATOR)
    row = tl.sum(products, axis=0)
    at = channel * (KERNEL_H * KERNEL_W) + pixel
    if IDENTITY:
        row += tl.load(basis + at, mask=drawn, other=0).to(ACCUMULATOR)
    tl.store(transformed + at, row.to(transformed.dtype.element_ty), mask=drawn)
    taps = ()
    for tap in tl.static_range(KERNEL_H * KERNEL_W):
        taps = taps + (tl.sum(tl.where(pixel == tap, row, 0)[None, :], axis=1),)  # type: ignore[assignment]  # noqa: RUF005

    offset = tl.zeros((1,), dtype=ACCUMULATOR)
    if bias is not None:
        offset += tl.load(bias + channel).to(ACCUMULATOR)
    for tile in range(tiles):
        forward_tile(
            tile, x, y, batch, channel, (channel // MULTIPLIER * x_channel)[None, :], None, offset, None, taps,
            x_image, x_pixel, y_image, y_channel, y_pixel,
            IN_H, IN_W, OUT_H, OUT_W, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W,
            ROWS, 1, ACCUMULATOR, BLOCK_P, 1,
        )  # fmt: skip


@triton.jit
def fused_backward_kernel(
    dy, x, transformed, basis, dx, grad_weight, grad_bias, grad_refocus, batch, group_size, tiles,
    x_image, x_channel, x_pixel, y_image, y_channel, y_pixel,
    MULTIPLIER: tl.constexpr, IN_H: tl.constexpr, IN_W: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    MAP: tl.constexpr, ROWS: tl.constexpr, LOW: tl.constexpr, COUNT: tl.constexpr, BIAS_TAP: tl.constexpr,
    ACCUMULATOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """dx (None: not wanted), dW_t, dW_r, and dbias as what the tap BIAS_TAP meets (-1: not). Programs: the channels."""
    channel = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    taps = ()
    sums = (tl.zeros((BLOCK_P, 1), dtype=ACCUMULATOR),)
    for tap in tl.static_range(KERNEL_H * KERNEL_W):
        value = tl.load(transformed + channel * (KERNEL_H * KERNEL_W) + tap).to(ACCUMULATOR)
        taps = taps + (value,)  # type: ignore[assignment]  # noqa: RUF005
        sums = sums + (tl.zeros((BLOCK_P, 1), dtype=ACCUMULATOR),)  # type: ignore[assignment]  # noqa: RUF005
    for tile in range(tiles):
        sums = backward_tile(
            tile, dy, x, dx, batch, channel, (channel // MULTIPLIER * x_channel)[None, :], None, 0, None, taps,
            sums, x_image, x_pixel, y_image, y_channel, y_pixel,
            IN_H, IN_W, OUT_H, OUT_W, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W,
            ROWS, LOW, COUNT, KERNEL_H, BIAS_TAP, ACCUMULATOR, BLOCK_P, 1,
        )  # fmt: skip
    totals = ()
    for tap in tl.static_range(KERNEL_H * KERNEL_W):
        total = tl.sum(sums[tap % KERNEL_W * KERNEL_H + tap // KERNEL_W], axis=0)
        tl.store(grad_weight + channel * (KERNEL_H * KERNEL_W) + tap, total.to(grad_weight.dtype.element_ty))
        totals = totals + (total,)  # type: ignore[assignment]  # noqa: RUF005
    if BIAS_TAP >= 0:
        total = tl.sum(sums[KERNEL_H * KERNEL_W], axis=0)
        tl.store(grad_bias + channel, total.to(grad_bias.dtype.element_ty))

    first = channel // group_size * group_size
    length = group_size * (MAP * MAP)
    for start in range(0, length, BLOCK_L):
        entry = start + tl.arange(0, BLOCK_L)
        valid = entry < length
        kernel, place = first + entry // (MAP * MAP), entry % (MAP * MAP)
        grad = tl.zeros((BLOCK_L,), dtype=ACCUMULATOR)
        for tap in tl.static_range(KERNEL_H * KERNEL_W):
            grad += totals[tap] * _seen(basis, kernel, tap, place, KERNEL_H, KERNEL_W, MAP, valid).to(ACCUMULATOR)
        tl.store(grad_refocus + channel * length + entry, grad.to(grad_refocus.dtype.element_ty), mask=valid)


# --- launches ------------------------------------------------------------------------------------------------


def forward(
    input: Tensor,
    basis: Tensor,
    refocus: Tensor,
    bias: Tensor | None,
    identity: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor]:
    """``(y, W_t)``; arguments as in the operator ``refconv2d``."""
    x, basis, refocus = input.contiguous(), basis.contiguous(), refocus.contiguous()
    bias = None if bias is None else bias.contiguous()
    transformed = torch.empty_like(basis, dtype=x.dtype)
    size = output_size(x, basis, stride, padding, dilation)
    y = x.new_empty(x.shape[0], basis.shape[0], *size)
    rows = strip_rows(size[0])
    with device_of(x):
        fused_forward_kernel[(basis.shape[0],)](
            x, basis, refocus, bias, y, transformed, x.shape[0], refocus.shape[1],
            triton.cdiv(x.shape[0] * triton.cdiv(size[0], rows) * size[1], _BLOCK_P), *strides(x), *strides(y),
            **constants(x, basis, y, stride, padding, dilation),
            MAP=refocus.shape[2], IDENTITY=identity, ROWS=rows, ACCUMULATOR=accumulator(x),
            BLOCK_P=_BLOCK_P, BLOCK_L=_BLOCK_L, BLOCK_S=power_of_2(basis[0].numel()), **options(x, 224),
        )  # fmt: skip
    return y, transformed


def backward(
    grad_output: Tensor,
    input: Tensor,
    transformed: Tensor,
    basis: Tensor,
    group_size: int,
    map_size: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    need_input: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dW_t, dW_r, dbias)``, of which dx and dbias are empty where not needed."""
    dy, x, transformed, basis = (t.contiguous() for t in (grad_output, input, transformed, basis))
    sizes = constants(x, basis, dy, stride, padding, dilation)
    rows = strip_rows(x.shape[2], stride[0])
    dbias_tap = bias_tap(sizes) if need_bias else -1
    dx = torch.empty_like(x) if need_input else x.new_empty(0)
    grad_weight = torch.empty_like(basis)
    grad_refocus = basis.new_empty(basis.shape[0] * basis.shape[1], group_size, map_size, map_size)
    grad_bias = basis.new_empty(basis.shape[0] if need_bias else 0)
    with device_of(x):
        fused_backward_kernel[(basis.shape[0],)](
            dy, x, transformed, basis, dx if need_input else None, grad_weight, grad_bias, grad_refocus,
            x.shape[0], group_size, triton.cdiv(x.shape[0] * triton.cdiv(x.shape[2], rows) * x.shape[3], _BLOCK_P),
            *strides(x), *strides(dy), **sizes, MAP=map_size, ROWS=rows, **met_rows(sizes, rows, basis.shape[2]),
            BIAS_TAP=dbias_tap, ACCUMULATOR=accumulator(x), BLOCK_P=_BLOCK_P, BLOCK_L=_BLOCK_L, **options(x, 224),
        )  # fmt: skip
        if need_bias and dbias_tap < 0:
            torch.sum(dy, (0, 2, 3), out=grad_bias)
    return dx, grad_weight, grad_refocus, grad_bias
