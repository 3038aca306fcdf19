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

MOST = 9  # taps, and rows of R, of a prologue: those of a 3x3 kernel, whose W_t stays in registers
_MOST_SUMMED = 64  # taps and bias in a tile of the sum over chunks; beyond, dE is a launch of its own
_TILE = 2048  # elements of one
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


@triton.jit
def reduction_kernel(
    partial, factor, grad_coordinates, grad_weight, grad_bias, chunks, channels, group_size,
    TAPS: tl.constexpr, RANK: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dE, dW and dbias, each None where not wanted, from partial sums [chunks, TAPS + 1, channels].

    Programs: channels in blocks. The sum over chunks is dW; its product with R^T is dE.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = tl.arange(0, BLOCK_T)
    real = channel < channels
    # Without a bias its row was not written.
    drawn = tap < (TAPS + 1 if grad_bias is not None else TAPS)
    wanted = drawn[:, None] & real[None, :]
    sums = tl.zeros((BLOCK_K, BLOCK_T, BLOCK_C), dtype=ACCUMULATOR)
    for start in range(0, chunks, BLOCK_K):
        chunk = start + tl.arange(0, BLOCK_K)
        from_ = partial + chunk[:, None, None] * ((TAPS + 1) * channels) + (tap[:, None] * channels + channel[None, :])
        sums += tl.load(from_, mask=(chunk < chunks)[:, None, None] & wanted[None, :, :], other=0)
    total = tl.sum(sums, axis=0)
    if grad_weight is not None:
        to = grad_weight + channel[None, :] * TAPS + tap[:, None]
        tl.store(to, total.to(grad_weight.dtype.element_ty), mask=(tap < TAPS)[:, None] & real[None, :])
    if grad_bias is not None:
        to = grad_bias + channel[None, :] + tl.zeros((BLOCK_T, 1), dtype=tl.int32)
        tl.store(to, total.to(grad_bias.dtype.element_ty), mask=(tap == TAPS)[:, None] & real[None, :])
    if grad_coordinates is not None:
        k = tl.arange(0, BLOCK_R)
        used = (k < RANK)[:, None] & (tap < TAPS)[None, :]
        from_ = factor + (channel // group_size)[None, None, :] * (RANK * TAPS) + (k[:, None] * TAPS + tap)[:, :, None]
        matrix = tl.load(from_, mask=used[:, :, None] & real[None, None, :], other=0).to(ACCUMULATOR)
        # An infinite dbias must not reach dE: zero times infinity is not zero.
        grad = tl.where((tap < TAPS)[:, None], total, 0)
        product = tl.sum(matrix * grad[None, :, :], axis=1)
        to = grad_coordinates + channel[None, :] * RANK + k[:, None]
        tl.store(to, product.to(grad_coordinates.dtype.element_ty), mask=(k < RANK)[:, None] & real[None, :])


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
    chunks, rows, channels = partial.shape
    _, rank, taps = factor.shape
    block_t, block_r = power_of_2(rows), power_of_2(max(1, rank))
    if rows - 1 != taps or max(block_t, block_r) > _MOST_SUMMED:
        totals = partial.sum(0)
        sums = totals[:taps].t().reshape(basis.shape)
        if grad_weight is not None:
            grad_weight.copy_(sums)
        if grad_bias is not None:
            grad_bias.copy_(totals[-1])
        if grad_coordinates is not None:
            _product(sums.contiguous(), factor, None, grad_coordinates, forward=False)
        return
    # Neighbouring channels share the sectors that are read; but every multiprocessor should have some.
    block_c = min(8, power_of_2(max(1, channels // 64)), max(1, 4096 // (block_t * block_r)))
    with device_of(partial):
        reduction_kernel[(triton.cdiv(channels, block_c),)](
            partial, factor, grad_coordinates, grad_weight, grad_bias, chunks, channels, channels // factor.shape[0],
            TAPS=taps, RANK=rank, ACCUMULATOR=accumulator(partial),
            BLOCK_K=max(1, _TILE // (block_t * block_c)), BLOCK_T=block_t, BLOCK_R=block_r, BLOCK_C=block_c,
            **options(partial),
        )  # fmt: skip
