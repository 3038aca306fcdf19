"""Depthwise convolution in Triton, the launches: which kernel, in tiles of which size."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from refconv_kernels.backends.triton.depthwise_kernels import backward_kernel, forward_kernel, input_gradient_kernel
from refconv_kernels.backends.triton.launch import (
    accumulator,
    bias_tap,
    blocks,
    constants,
    device_of,
    met_rows,
    options,
    strides,
    strip_rows,
    words,
)
from refconv_kernels.geometry import output_format, output_size

_FUSED_TAPS = 25  # sums of dW in registers; beyond, dx and dW are two launches, dW's by kernel rows
_PROGRAMS = 2048  # of a backward: enough for every multiprocessor, few enough for short partial sums
_FORWARD_TILES = 16  # of a program, so that what it does once adds little to each;
_FORWARD_PROGRAMS = 4096  # but as many programs as that, lest the last ones leave most multiprocessors idle


class Thin(NamedTuple):
    """What a prologue makes ``W_t`` of, besides ``W_b``: ``E``, ``R``, and whether ``W_b`` is added."""

    coordinates: Tensor
    factor: Tensor
    identity: bool

    def arguments(self) -> dict[str, Any]:
        """Of the kernels."""
        values = self.coordinates.contiguous(), self.factor.contiguous(), self.factor.shape[1], self.identity
        return dict(zip(("coordinates", "factor", "RANK", "IDENTITY"), values, strict=True))


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    thin: Thin | None = None,
) -> Tensor:
    """``y`` ``[B, C_out, H_out, W_out]``; arguments as in the operator ``grouped_conv2d``.

    With ``thin``, ``weight`` is ``W_b``.
    """
    layout = output_format(input, weight)
    x, weight = input.contiguous(memory_format=layout), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    size = output_size(input, weight, stride, padding, dilation)
    y = torch.empty(
        (input.shape[0], weight.shape[0], *size), dtype=input.dtype, device=input.device, memory_format=layout
    )
    if y.numel() == 0:
        return y
    rows = strip_rows(size[0], 1, 8 if layout is torch.contiguous_format and x.dtype != torch.float64 else 4)
    held = ((rows - 1) * stride[0] + (weight.shape[2] - 1) * dilation[0] + 1 + rows) * words(x)
    block_p, block_c = blocks(y.shape[1], layout is torch.channels_last, held)
    # Columns of taps whose loads may be under way together.
    unrolled = weight.shape[3] if weight.shape[3] <= 3 and held * block_p * block_c <= 48 * 128 else 1
    tiles = triton.cdiv(y.shape[0] * triton.cdiv(size[0], rows) * size[1], block_p)
    channel_blocks = triton.cdiv(y.shape[1], block_c)
    per_program = max(1, min(_FORWARD_TILES, tiles * channel_blocks // _FORWARD_PROGRAMS))
    with device_of(x):
        forward_kernel[(triton.cdiv(tiles, per_program), channel_blocks)](
            x, weight, bias, y, y.shape[0], y.shape[1], tiles, per_program, *strides(x), *strides(y),
            **constants(x, weight, y, stride, padding, dilation), ROWS=rows,
            UNROLL_W=unrolled,
            ACCUMULATOR=accumulator(x), BLOCK_P=block_p, BLOCK_C=block_c,
            **({} if thin is None else thin.arguments()), **options(x, 80 if block_c == 1 else 128),
        )  # fmt: skip
    return y


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
    grad_weight = (
        torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else weight.new_empty(0)
    )
    grad_bias = weight.new_empty(weight.shape[0] if need_bias else 0)
    geometry = stride, padding, dilation
    dx, partial, summed = partial_sums(grad_output, input, weight, *geometry, need_input, need_weight, need_bias)
    if partial is not None:
        with device_of(input):
            totals = partial.sum(0)
            grad_weight.copy_(totals[: weight[0].numel()].t().reshape(weight.shape))
            if summed:
                grad_bias.copy_(totals[-1])
    elif need_weight:
        grad_weight.zero_()
    if need_bias and not summed:
        torch.sum(grad_output, (0, 2, 3), out=grad_bias)
    return dx, grad_weight, grad_bias


def partial_sums(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    thin: Thin | None = None,
) -> tuple[Tensor, Tensor | None, bool]:
    """dx, the sums of dW by chunks ``[chunks, taps + 1, C_out]``, and whether their last row holds those of dbias.

    dx is empty where not needed; there are no sums where not needed or nothing is to be added up. With ``thin``, which
    is for problems that :func:`is_fused`, ``weight`` is ``W_b``.
    """
    layout = output_format(input, weight)
    dy, x = grad_output.contiguous(memory_format=layout), input.contiguous(memory_format=layout)
    weight = weight.contiguous()
    dx = torch.empty_like(x) if need_input else x.new_empty(0)
    if dy.numel() == 0 or x.numel() == 0:
        return dx.zero_(), None, False

    sizes = constants(x, weight, dy, stride, padding, dilation)
    taps, kernel_w = weight[0].numel(), weight.shape[3]
    fused = need_weight and is_fused(x, weight)
    with device_of(x):
        if need_input and not fused:
            _input_gradient(dy, x, weight, dx, sizes, layout is torch.channels_last)
        if not need_weight:
            return dx, None, False
        tap_rows = weight.shape[2] if taps <= _FUSED_TAPS else max(1, _FUSED_TAPS // kernel_w)
        tap_rows = min(triton.cdiv(tap_rows, stride[0]) * stride[0], weight.shape[2])  # a block spans whole strides
        dbias_tap = bias_tap(sizes) if need_bias and tap_rows == weight.shape[2] else -1
        # A strip holds the sums of its taps besides its pixels; of a long row of taps ptxas loads all columns at once.
        few = taps <= 9 and x.dtype != torch.float64
        rows = strip_rows(x.shape[2], stride[0], 8 if few and layout is torch.contiguous_format else 4)
        rows = rows if kernel_w <= _FUSED_TAPS else stride[0]
        block_p, block_c = blocks(dy.shape[1], layout is torch.channels_last, 20 if few else 64)
        tiles = triton.cdiv(x.shape[0] * triton.cdiv(x.shape[2], rows) * x.shape[3], block_p)
        channel_blocks, row_blocks = triton.cdiv(dy.shape[1], block_c), triton.cdiv(weight.shape[2], tap_rows)
        per_chunk = triton.cdiv(tiles, max(1, _PROGRAMS // (channel_blocks * row_blocks)))
        chunks = triton.cdiv(tiles, per_chunk)
        partial = torch.empty(
            (chunks, row_blocks * tap_rows * kernel_w + 1, dy.shape[1]),
            dtype=torch.promote_types(x.dtype, torch.float32),
            device=x.device,
        )
        backward_kernel[(chunks, channel_blocks, row_blocks)](
            dy, x, weight, dx if fused and need_input else None, partial, x.shape[0], dy.shape[1], tiles, per_chunk,
            *strides(x), *strides(dy), **sizes, ROWS=rows, **met_rows(sizes, rows, tap_rows),
            TAP_ROWS=tap_rows, BIAS_TAP=dbias_tap, ACCUMULATOR=accumulator(x), BLOCK_P=block_p, BLOCK_C=block_c,
            **(thin.arguments() if thin is not None and need_input else {}), **options(x, 168 if few else 255),
        )  # fmt: skip
    return dx, partial, dbias_tap >= 0


def _input_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, dx: Tensor, sizes: dict[str, int], channels_last: bool
) -> None:
    """Fill dx by a kernel of its own."""
    rows = strip_rows(x.shape[2], sizes["STRIDE_H"], 4 if channels_last or x.dtype == torch.float64 else 8)
    met = met_rows(sizes, rows, weight.shape[2])
    block_p, block_c = blocks(x.shape[1], channels_last, (met["COUNT"] + rows) * words(x))
    strips = x.shape[0] * triton.cdiv(x.shape[2], rows) * x.shape[3]
    input_gradient_kernel[(triton.cdiv(strips, block_p), triton.cdiv(x.shape[1], block_c))](
        dy, weight, dx, x.shape[0], x.shape[1], *strides(x), *strides(dy), **sizes, ROWS=rows, **met,
        ACCUMULATOR=accumulator(x), BLOCK_P=block_p, BLOCK_C=block_c, **options(x, 168),
    )  # fmt: skip


def is_fused(input: Tensor, weight: Tensor) -> bool:
    """Whether one launch makes dx and the sums of dW."""
    return weight.shape[0] == input.shape[1] and weight[0].numel() <= _FUSED_TAPS
