"""Depthwise convolution in Triton, the launches: which kernel, in tiles of which size.

Every launch has a rule, which makes its default configuration and others near it; :mod:`.tuning` may choose among them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from refconv_kernels.backends.triton import tuning
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
from refconv_kernels.backends.triton.reduction import reduce
from refconv_kernels.backends.triton.tuning import Configuration
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
    nchw, sizes = layout is torch.contiguous_format, constants(x, weight, y, stride, padding, dilation)

    def rule(other: bool = False, warps: int = 4, spread: float = 1) -> Configuration:
        rows = strip_rows(size[0], 1, _tallest(nchw and x.dtype != torch.float64, other, x))
        held = ((rows - 1) * stride[0] + (weight.shape[2] - 1) * dilation[0] + 1 + rows) * words(x)
        block_p, block_c = blocks(y.shape[1], not nchw, held, warps)
        unrolled = weight.shape[3] if weight.shape[3] <= 3 and held * block_p * block_c <= 48 * 32 * warps else 1
        tiles = _tiles(y, rows, block_p)
        each = max(1, min(_FORWARD_TILES, tiles * triton.cdiv(y.shape[1], block_c) // _FORWARD_PROGRAMS))
        each = max(1, min(int(each / spread), tiles))
        registers = (80 if weight.shape[3] <= 9 else 128) if block_c == 1 else 128
        if block_c > 1 and (warps == 2 or (other and held > 40)):
            registers = 255  # ptxas spills otherwise
        return Configuration(rows, block_p, block_c, each, unrolled, registers, warps)

    def launch(chosen: Configuration) -> None:
        tiles = _tiles(y, chosen.rows, chosen.block_p)
        grid = triton.cdiv(tiles, chosen.tiles), triton.cdiv(y.shape[1], chosen.block_c)
        forward_kernel[grid](
            x, weight, bias, y, y.shape[0], y.shape[1], tiles, chosen.tiles, *strides(x), *strides(y),
            **sizes, UNROLL_W=chosen.unrolled, **_compiled(x, chosen), **({} if thin is None else thin.arguments()),
        )  # fmt: skip

    with device_of(x):
        chosen = rule()
        if tuning.timer is not None:
            chosen = tuning.choose(_problem("forward", x, weight, sizes, nchw, thin), x.device, rule, launch)
        launch(chosen)
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
    like: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx, dW, dbias)``, empty where not needed; arguments as in the operator ``grouped_conv2d_backward``.

    dW and dbias are of the type of ``like``, or else of ``weight``.
    """
    like = weight if like is None else like
    grad_weight = torch.empty_like(like, memory_format=torch.contiguous_format) if need_weight else like.new_empty(0)
    grad_bias = like.new_empty(like.shape[0] if need_bias else 0)
    geometry = stride, padding, dilation
    dx, partial, summed = partial_sums(grad_output, input, weight, *geometry, need_input, need_weight, need_bias)
    if partial is not None:
        reduce(partial, weight[0].numel(), grad_weight, grad_bias if summed else None)
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
    fused, nchw = need_weight and is_fused(x, weight), layout is torch.contiguous_format
    with device_of(x):
        if need_input and not fused:
            _input_gradient(dy, x, weight, dx, sizes, nchw)
        if not need_weight:
            return dx, None, False
        tap_rows = weight.shape[2] if taps <= _FUSED_TAPS else max(1, _FUSED_TAPS // kernel_w)
        tap_rows = min(triton.cdiv(tap_rows, stride[0]) * stride[0], weight.shape[2])  # a block spans whole strides
        dbias_tap = bias_tap(sizes) if need_bias and tap_rows == weight.shape[2] else -1
        # A strip holds the sums of its taps besides its pixels; of a long row of taps ptxas loads all columns at once.
        few = taps <= 9 and x.dtype != torch.float64
        row_blocks = triton.cdiv(weight.shape[2], tap_rows)
        prologue = thin if need_input else None

        def rule(other: bool = False, warps: int = 4, spread: float = 1) -> Configuration:
            tallest = _tallest(few and nchw, other, x)
            rows = strip_rows(x.shape[2], stride[0], tallest) if kernel_w <= _FUSED_TAPS else stride[0]
            held = 20 if few and (nchw or tallest == 4) else 64
            block_p, block_c = blocks(dy.shape[1], not nchw, held, warps)
            programs = int(_PROGRAMS * spread) // (triton.cdiv(dy.shape[1], block_c) * row_blocks)
            each = triton.cdiv(_tiles(x, rows, block_p), max(1, programs))
            return Configuration(rows, block_p, block_c, each, kernel_w, 168 if few else 255, warps)

        def launch(chosen: Configuration) -> Tensor:
            tiles = _tiles(x, chosen.rows, chosen.block_p)
            grid = triton.cdiv(tiles, chosen.tiles), triton.cdiv(dy.shape[1], chosen.block_c), row_blocks
            shape = grid[0], row_blocks * tap_rows * kernel_w + 1, dy.shape[1]
            partial = torch.empty(shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
            backward_kernel[grid](
                dy, x, weight, dx if fused and need_input else None, partial, x.shape[0], dy.shape[1], tiles,
                chosen.tiles, *strides(x), *strides(dy), **sizes, **met_rows(sizes, chosen.rows, tap_rows),
                TAP_ROWS=tap_rows, BIAS_TAP=dbias_tap, **_compiled(x, chosen),
                **({} if prologue is None else prologue.arguments()),
            )  # fmt: skip
            return partial

        chosen = rule()
        if tuning.timer is not None:
            problem = _problem("backward", x, weight, sizes, nchw, prologue, fused and need_input, dbias_tap >= 0)
            chosen = tuning.choose(
                problem, x.device, rule,
                # More programs leave more to add up, which is part of the time.
                lambda one: reduce(launch(one), taps, torch.empty_like(weight), None),
            )  # fmt: skip
        partial = launch(chosen)
    return dx, partial, dbias_tap >= 0


def _input_gradient(dy: Tensor, x: Tensor, weight: Tensor, dx: Tensor, sizes: dict[str, int], nchw: bool) -> None:
    """Fill dx by a kernel of its own."""

    def rule(other: bool = False, warps: int = 4, spread: float = 1) -> Configuration:
        rows = strip_rows(x.shape[2], sizes["STRIDE_H"], _tallest(nchw and x.dtype != torch.float64, other, x))
        held = (met_rows(sizes, rows, weight.shape[2])["COUNT"] + rows) * words(x)
        # One tile to a program: there is nothing that a program does once.
        return Configuration(rows, *blocks(x.shape[1], not nchw, held, warps), 1, 1, 168, warps)

    def launch(chosen: Configuration) -> None:
        grid = _tiles(x, chosen.rows, chosen.block_p), triton.cdiv(x.shape[1], chosen.block_c)
        input_gradient_kernel[grid](
            dy, weight, dx, x.shape[0], x.shape[1], *strides(x), *strides(dy), **sizes,
            **met_rows(sizes, chosen.rows, weight.shape[2]), **_compiled(x, chosen),
        )  # fmt: skip

    chosen = rule()
    if tuning.timer is not None:
        chosen = tuning.choose(_problem("input_gradient", x, weight, sizes, nchw, None), x.device, rule, launch)
    launch(chosen)


def _tallest(tall: bool, other: bool, tensor: Tensor) -> int:
    """Pixels of a strip at most: 8 where it is to be ``tall``, else 4; or the ``other``, if registers can hold that."""
    return 8 if tall != (other and tensor.dtype != torch.float64) else 4


def _tiles(feature_map: Tensor, rows: int, block_p: int) -> int:
    """Tiles that cover the pixels of a map, of one block of channels."""
    batch, _, height, width = feature_map.shape
    return triton.cdiv(batch * triton.cdiv(height, rows) * width, block_p)


def _compiled(tensor: Tensor, chosen: Configuration) -> dict[str, Any]:
    """What a configuration means for every kernel."""
    named = {"ROWS": chosen.rows, "BLOCK_P": chosen.block_p, "BLOCK_C": chosen.block_c, "num_warps": chosen.warps}
    return {**named, "ACCUMULATOR": accumulator(tensor), **options(tensor, chosen.registers)}


def _problem(
    kernel: str, x: Tensor, weight: Tensor, sizes: dict[str, int], nchw: bool, thin: Thin | None, *more: bool
) -> tuple[Any, ...]:
    """All that the best configuration may depend on, besides the device and the versions."""
    rank = 0 if thin is None else thin.factor.shape[1]
    return kernel, x.dtype, weight.dtype, nchw, *x.shape[:2], *sizes.values(), rank, *more


def is_fused(input: Tensor, weight: Tensor) -> bool:
    """Whether one launch makes dx and the sums of dW."""
    return weight.shape[0] == input.shape[1] and weight[0].numel() <= _FUSED_TAPS
