"""The thin form in Triton: ``W_t = W_b + E R`` and ``dE = dW_t R^T`` (docs/numerics.md).

Alone (:func:`forward`, :func:`backward`) both are one streaming product, every tensor once, for any convolution. In a
depthwise layer (:func:`convolution_forward`, :func:`convolution_backward`) the first is a prologue of the convolution's
kernels where :func:`in_registers` says so, and the second the end of the sum over dW's chunks: no launch of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refconv_kernels.backends.triton import depthwise
from refconv_kernels.backends.triton.launch import accumulator, device_of, options, power_of_2
from refconv_kernels.backends.triton.reduction import multiplies, reduce

MOST = 9  # taps, and rows of R, of a prologue: those of a 3x3 kernel, whose W_t stays in registers
_BLOCK = 256  # elements of a tile of the product: there are few in all, and every multiprocessor wants some


@triton.jit
def product_kernel(
    left, factor, basis, out, kernels, group_size, inner_stride, column_stride, matrix,
    INNER: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Rows of ``left`` [kernels, INNER] times their group's matrix, plus the basis (None: not), [kernels, COLUMNS].

    A matrix has ``matrix`` elements, ``inner_stride`` and ``column_stride`` apart. Programs: (rows, columns) in blocks.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    real = n < kernels
    stored = real[:, None] & (column < COLUMNS)[None, :]
    matrices = factor + (n // group_size)[:, None] * matrix + (column * column_stride)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_S), dtype=ACCUMULATOR)
    if basis is not None:
        total += tl.load(basis + n[:, None] * COLUMNS + column[None, :], mask=stored, other=0).to(ACCUMULATOR)
    for inner in tl.range(0, INNER, loop_unroll_factor=UNROLL):
        along = tl.load(left + n * INNER + inner, mask=real, other=0).to(ACCUMULATOR)
        total += along[:, None] * tl.load(matrices + inner * inner_stride, mask=stored, other=0).to(ACCUMULATOR)
    tl.store(out + n[:, None] * COLUMNS + column[None, :], total.to(out.dtype.element_ty), mask=stored)


# --- launches ------------------------------------------------------------------------------------------------


def _product(left: Tensor, factor: Tensor, basis: Tensor | None, out: Tensor, forward: bool) -> Tensor:
    """``out = left R + basis``, or ``left R^T``, by refocus groups."""
    if out.numel() == 0:
        return out
    _, rank, pixels = factor.shape
    inner, columns = (rank, pixels) if forward else (pixels, rank)
    kernels = out.numel() // columns
    block_s = min(power_of_2(columns), 64)
    block_n = _BLOCK // block_s
    with device_of(out):
        product_kernel[(triton.cdiv(kernels, block_n), triton.cdiv(columns, block_s))](
            left, factor, basis, out, kernels, kernels // factor.shape[0],
            *((pixels, 1) if forward else (1, pixels)), rank * pixels,
            INNER=inner, COLUMNS=columns, UNROLL=inner if 0 < inner <= 9 else 4, ACCUMULATOR=accumulator(out),
            BLOCK_N=block_n, BLOCK_S=block_s, **options(out),
        )  # fmt: skip
    return out


def forward(
    basis: Tensor, coordinates: Tensor, factor: Tensor, identity: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """``W_t`` in the shape of ``basis``, and in ``dtype``; arguments as in the operator ``thin_refocus_weight``."""
    basis, coordinates, factor = basis.contiguous(), coordinates.contiguous(), factor.contiguous()
    out = torch.empty_like(basis, dtype=dtype)
    return _product(coordinates, factor, basis if identity else None, out, forward=True)


def backward(grad_transformed: Tensor, factor: Tensor) -> Tensor:
    """``dE`` ``[N, r]``; arguments as in the operator ``thin_refocus_weight_backward``."""
    out = factor.new_empty(grad_transformed.shape[0] * grad_transformed.shape[1], factor.shape[1])
    return _product(grad_transformed.contiguous(), factor.contiguous(), None, out, forward=False)


def in_registers(input: Tensor, basis: Tensor, factor: Tensor) -> bool:
    """Whether the convolution's kernels make ``W_t`` themselves.

    A program makes it once for all its tiles, which costs each thread as much as another ``r`` pixels: 9 for 3x3
    kernels, where it has 4 or more per tile. Larger kernels have more rows in R, and more taps than registers hold;
    with a channel multiplier dx has a kernel of its own.
    """
    return input.shape[1] == basis.shape[0] and max(factor.shape[1:]) <= MOST


def _weight(
    input: Tensor, basis: Tensor, coordinates: Tensor, factor: Tensor, identity: bool
) -> tuple[Tensor, depthwise.Thin | None]:
    """What a convolution's kernels take for weights: ``W_b`` with a prologue, or ``W_t``, not rounded to a half."""
    if in_registers(input, basis, factor):
        return basis, depthwise.Thin(coordinates, factor, identity)
    dtype = torch.promote_types(basis.dtype, torch.float32)
    return forward(basis, coordinates, factor, identity, dtype), None


def convolution_forward(
    input: Tensor,
    basis: Tensor,
    coordinates: Tensor,
    factor: Tensor,
    bias: Tensor | None,
    identity: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """``y``; arguments as in the operator ``thin_refconv2d``."""
    weight, prologue = _weight(input, basis, coordinates, factor, identity)
    return depthwise.forward(input, weight, bias, stride, padding, dilation, prologue)


def convolution_backward(
    grad_output: Tensor,
    input: Tensor,
    basis: Tensor,
    coordinates: Tensor,
    factor: Tensor,
    identity: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    need_input: bool,
    need_weight: bool,
    need_coordinates: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dW_t, dE, dbias)``, empty where not needed; arguments as in the operator ``thin_refconv2d_backward``."""
    need_sums = need_weight or need_coordinates
    weight, prologue = basis, None
    if need_input and not need_sums:  # a kernel without a prologue
        weight = forward(basis, coordinates, factor, identity, torch.promote_types(basis.dtype, torch.float32))
    elif need_input:
        weight, prologue = _weight(input, basis, coordinates, factor, identity)
    geometry = stride, padding, dilation
    dx, partial, bias_summed = depthwise.partial_sums(
        grad_output, input, weight, *geometry, need_input, need_sums, need_bias, prologue
    )
    grad_weight = torch.empty_like(basis, memory_format=torch.contiguous_format) if need_weight else basis.new_empty(0)
    grad_coordinates = torch.empty_like(coordinates, memory_format=torch.contiguous_format)
    grad_coordinates = grad_coordinates if need_coordinates else coordinates.new_empty(0)
    grad_bias = basis.new_empty(basis.shape[0] if need_bias else 0)
    if partial is None:
        grad_weight.zero_()
        grad_coordinates.zero_()
    else:
        _reduce(
            partial,
            factor.contiguous(),
            grad_coordinates if need_coordinates else None,
            grad_weight if need_weight else None,
            grad_bias if bias_summed else None,
            basis,
        )
    if need_bias and not bias_summed:
        torch.sum(grad_output, (0, 2, 3), out=grad_bias)
    return dx, grad_weight, grad_coordinates, grad_bias


def _reduce(
    partial: Tensor,
    factor: Tensor,
    grad_coordinates: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    basis: Tensor,
) -> None:
    """Fill the gradients, None where not wanted, from the sums of chunks."""
    taps = factor.shape[2]
    if grad_coordinates is None or multiplies(partial, factor):
        reduce(partial, taps, grad_weight, grad_bias, factor, grad_coordinates)
        return
    sums = partial.new_empty(basis.shape)  # not rounded to a half
    reduce(partial, taps, sums, grad_bias)
    if grad_weight is not None:
        grad_weight.copy_(sums)
    _product(sums, factor, None, grad_coordinates, forward=False)
