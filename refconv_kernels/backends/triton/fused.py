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

from refconv_kernels.backends.triton.depthwise_kernels import NOWHERE, _coordinates, _within
from refconv_kernels.backends.triton.launch import (
    accumulator,
    bias_tap,
    constants,
    device_of,
    power_of_2,
    registers,
    strides,
)
from refconv_kernels.backends.triton.refocus import _seen
from refconv_kernels.geometry import output_format, output_size

FEWEST_CHANNELS = 512  # programs, of four warps each: three to eight for every multiprocessor
MOST_PIXELS = 8192  # of one channel: as many bytes as a row of W_r or two
MOST_TAPS = 9  # that a program keeps in registers, with their sums
_BLOCK_P, _BLOCK_L = 512, 256


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
    MAP: tl.constexpr, IDENTITY: tl.constexpr, HAS_BIAS: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """y and W_t. Programs: the channels."""
    channel = tl.program_id(0).to(tl.int64)
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
        taps = taps + (tl.sum(tl.where(pixel == tap, row, 0), axis=0),)  # type: ignore[assignment]  # noqa: RUF005

    offset = tl.zeros((BLOCK_P,), dtype=ACCUMULATOR)
    if HAS_BIAS:
        offset += tl.load(bias + channel).to(ACCUMULATOR)
    for tile in range(tiles):
        image, i, j, exists = _coordinates(tile, batch, BLOCK_P, OUT_H, OUT_W)
        top, left = i * STRIDE_H - PAD_H, j * STRIDE_W - PAD_W
        corner = x + image.to(tl.int64) * x_image + channel // MULTIPLIER * x_channel + (top * IN_W + left) * x_pixel
        top = tl.where(exists, top, NOWHERE)
        total = offset
        for a in tl.static_range(KERNEL_H):
            for b in tl.static_range(KERNEL_W):
                seen = _within(top + a * DILATION_H, IN_H) & _within(left + b * DILATION_W, IN_W)
                value = tl.load(corner + (a * DILATION_H * IN_W + b * DILATION_W) * x_pixel, mask=seen, other=0)
                total += value.to(ACCUMULATOR) * taps[a * KERNEL_W + b]
        to = y + image.to(tl.int64) * y_image + channel * y_channel + (i * OUT_W + j) * y_pixel
        tl.store(to, total.to(y.dtype.element_ty), mask=exists)


@triton.jit
def fused_backward_kernel(
    dy, x, transformed, basis, dx, grad_weight, grad_bias, grad_refocus, batch, group_size, tiles,
    x_image, x_channel, x_pixel, y_image, y_channel, y_pixel,
    MULTIPLIER: tl.constexpr, IN_H: tl.constexpr, IN_W: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    MAP: tl.constexpr, BIAS_TAP: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """dx (None: not wanted), dW_t, dW_r, and dbias as what the tap BIAS_TAP meets (-1: not). Programs: the channels."""
    channel = tl.program_id(0).to(tl.int64)
    taps = ()
    sums = ()
    for tap in tl.static_range(KERNEL_H * KERNEL_W):
        value = tl.load(transformed + channel * (KERNEL_H * KERNEL_W) + tap).to(ACCUMULATOR)
        taps = taps + (value,)  # type: ignore[assignment]  # noqa: RUF005
        sums = sums + (tl.zeros((BLOCK_P,), dtype=ACCUMULATOR),)  # type: ignore[assignment]  # noqa: RUF005
    bias_sum = tl.zeros((BLOCK_P,), dtype=ACCUMULATOR)
    for tile in range(tiles):
        image, h, w, exists = _coordinates(tile, batch, BLOCK_P, IN_H, IN_W)
        here = image.to(tl.int64) * x_image + channel // MULTIPLIER * x_channel + (h * IN_W + w) * x_pixel
        pixel = tl.load(x + here, mask=exists, other=0).to(ACCUMULATOR)
        plane = dy + image.to(tl.int64) * y_image + channel * y_channel
        gradient = tl.zeros((BLOCK_P,), dtype=ACCUMULATOR)
        added = ()
        for a in tl.static_range(KERNEL_H):
            for b in tl.static_range(KERNEL_W):
                top, left = h + PAD_H - a * DILATION_H, w + PAD_W - b * DILATION_W
                i, j = top // STRIDE_H, left // STRIDE_W
                seen = exists & (top >= 0) & (i < OUT_H) & (left >= 0) & (j < OUT_W)
                seen = seen & (top % STRIDE_H == 0) & (left % STRIDE_W == 0)
                met = tl.load(plane + (i * OUT_W + j) * y_pixel, mask=seen, other=0).to(ACCUMULATOR)
                share = tl.where(seen, pixel, 0) * met
                added = added + (sums[a * KERNEL_W + b] + share,)  # type: ignore[assignment]  # noqa: RUF005
                if a * KERNEL_W + b == BIAS_TAP:
                    bias_sum += met
                gradient += met * taps[a * KERNEL_W + b]
        sums = added
        if dx is not None:
            tl.store(dx + here, gradient.to(dx.dtype.element_ty), mask=exists)
    totals = ()
    for tap in tl.static_range(KERNEL_H * KERNEL_W):
        total = tl.sum(sums[tap], axis=0)
        tl.store(grad_weight + channel * (KERNEL_H * KERNEL_W) + tap, total.to(grad_weight.dtype.element_ty))
        totals = totals + (total,)  # type: ignore[assignment]  # noqa: RUF005
    if BIAS_TAP >= 0:
        tl.store(grad_bias + channel, tl.sum(bias_sum, axis=0).to(grad_bias.dtype.element_ty))

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
    transformed = torch.empty_like(basis)
    size = output_size(x, basis, stride, padding, dilation)
    y = x.new_empty(x.shape[0], basis.shape[0], *size)
    with device_of(x):
        fused_forward_kernel[(basis.shape[0],)](
            x, basis, refocus, bias, y, transformed, x.shape[0], refocus.shape[1],
            triton.cdiv(x.shape[0] * size[0] * size[1], _BLOCK_P), *strides(x), *strides(y),
            **constants(x, basis, y, stride, padding, dilation),
            MAP=refocus.shape[2], IDENTITY=identity, HAS_BIAS=bias is not None, ACCUMULATOR=accumulator(x),
            BLOCK_P=_BLOCK_P, BLOCK_L=_BLOCK_L, BLOCK_S=power_of_2(basis[0].numel()), **registers(x, 224),
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
    dbias_tap = bias_tap(sizes) if need_bias else -1
    dx = torch.empty_like(x) if need_input else x.new_empty(0)
    grad_weight = torch.empty_like(basis)
    grad_refocus = basis.new_empty(basis.shape[0] * basis.shape[1], group_size, map_size, map_size)
    grad_bias = basis.new_empty(basis.shape[0] if need_bias else 0)
    with device_of(x):
        fused_backward_kernel[(basis.shape[0],)](
            dy, x, transformed, basis, dx if need_input else None, grad_weight, grad_bias, grad_refocus,
            x.shape[0], group_size, triton.cdiv(x.shape[0] * x.shape[2] * x.shape[3], _BLOCK_P),
            *strides(x), *strides(dy), **sizes,
            MAP=map_size, BIAS_TAP=dbias_tap, ACCUMULATOR=accumulator(x),
            BLOCK_P=_BLOCK_P, BLOCK_L=_BLOCK_L, **registers(x, 224),
        )  # fmt: skip
        if need_bias and dbias_tap < 0:
            torch.sum(dy, (0, 2, 3), out=grad_bias)
    return dx, grad_weight, grad_refocus, grad_bias
