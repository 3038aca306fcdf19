"""The end of every depthwise backward in Triton: dW and dbias, and dE of the thin form, from the sums of chunks."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from refconv_kernels.backends.triton.launch import accumulator, device_of, options, power_of_2

_MOST = 64  # rows of sums, and coordinates, in a tile that makes dE
_TILE = 2048  # elements of a tile


@triton.jit
def reduction_kernel(
    partial, factor, grad_coordinates, grad_weight, grad_bias, chunks, channels, group_size,
    ROWS: tl.constexpr, TAPS: tl.constexpr, RANK: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dE, dW and dbias, each None where not wanted, from partial sums [chunks, ROWS, channels], in a fixed order.

    The first TAPS rows are dW's, the last is that of dbias. Programs: (channels, rows) in blocks; for dE, the product
    of dW and R^T, one block has all rows.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    real = channel < channels
    drawn = row < TAPS
    if grad_bias is not None:  # without one its row was not written
        drawn = drawn | (row == ROWS - 1)
    wanted = drawn[:, None] & real[None, :]
    sums = tl.zeros((BLOCK_K, BLOCK_T, BLOCK_C), dtype=ACCUMULATOR)
    for start in range(0, chunks, BLOCK_K):
        chunk = start + tl.arange(0, BLOCK_K)
        from_ = partial + chunk[:, None, None] * (ROWS * channels) + (row[:, None] * channels + channel[None, :])
        sums += tl.load(from_, mask=(chunk < chunks)[:, None, None] & wanted[None, :, :], other=0)
    total = tl.sum(sums, axis=0)
    if grad_weight is not None:
        to = grad_weight + channel[None, :] * TAPS + row[:, None]
        tl.store(to, total.to(grad_weight.dtype.element_ty), mask=(row < TAPS)[:, None] & real[None, :])
    if grad_bias is not None:
        to = grad_bias + channel[None, :] + tl.zeros((BLOCK_T, 1), dtype=tl.int32)
        tl.store(to, total.to(grad_bias.dtype.element_ty), mask=(row == ROWS - 1)[:, None] & real[None, :])
    if grad_coordinates is not None:
        k = tl.arange(0, BLOCK_R)
        used = (k < RANK)[:, None] & (row < TAPS)[None, :]
        from_ = factor + (channel // group_size)[None, None, :] * (RANK * TAPS) + (k[:, None] * TAPS + row)[:, :, None]
        matrix = tl.load(from_, mask=used[:, :, None] & real[None, None, :], other=0).to(ACCUMULATOR)
        # An infinite dbias must not reach dE: zero times infinity is not zero.
        grad = tl.where((row < TAPS)[:, None], total, 0)
        product = tl.sum(matrix * grad[None, :, :], axis=1)
        to = grad_coordinates + channel[None, :] * RANK + k[:, None]
        tl.store(to, product.to(grad_coordinates.dtype.element_ty), mask=(k < RANK)[:, None] & real[None, :])


def multiplies(partial: Tensor, factor: Tensor) -> bool:
    """Whether :func:`reduce` can make dE too."""
    return max(partial.shape[1], factor.shape[1]) <= _MOST


def reduce(
    partial: Tensor,
    taps: int,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    factor: Tensor | None = None,
    grad_coordinates: Tensor | None = None,
) -> None:
    """Fill dW ``[channels, taps]``, dbias and dE, None where not wanted, from sums ``[chunks, rows, channels]``."""
    chunks, rows, channels = partial.shape
    if factor is None or grad_coordinates is None:
        # 8 neighbouring channels are a sector of 32 bytes, and a row at a time makes as many programs as there can be.
        factor = grad_coordinates = None
        rank, group_size, block_t, block_r, block_c = 0, 1, 1, 1, min(8, power_of_2(channels))
    else:
        rank, group_size = factor.shape[1], channels // factor.shape[0]
        block_t, block_r = power_of_2(rows), power_of_2(max(1, rank))
        # Neighbouring channels share the sectors that are read; but every multiprocessor should have some.
        block_c = min(8, power_of_2(max(1, channels // 64)), max(1, 4096 // (block_t * block_r)))
    with device_of(partial):
        reduction_kernel[(triton.cdiv(channels, block_c), triton.cdiv(rows, block_t))](
            partial, factor, grad_coordinates, grad_weight, grad_bias, chunks, channels, group_size,
            ROWS=rows, TAPS=taps, RANK=rank, ACCUMULATOR=accumulator(partial),
            BLOCK_K=max(1, _TILE // (block_t * block_c)), BLOCK_T=block_t, BLOCK_R=block_r, BLOCK_C=block_c,
            **options(partial),
        )  # fmt: skip
