"""The Refocusing Transformation in Triton, full form: ``W_t`` from ``W_b`` and ``W_r``, and ``dW_r`` from ``dW_t``.

Wide groups (depthwise and groupwise bases; kernels ``wide_*``): a product of rows of ``W_r`` with the unfolded basis,
whose entries are gathered from ``W_b`` in the first cache, once for BLOCK_N rows. ``W_r`` is read once, ``dW_r``
written once. Narrow groups (dense bases; kernels ``narrow_*``): a tile of 2-D kernels, each with its own map; every
tensor once. Sums are float32 (float64 for float64) in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refconv_kernels.backends.triton.launch import accumulator, device_of, options, power_of_2

_WIDE_ROW = 64  # entries of W_r per 2-D kernel from which a row is worth a program
_MOST_PIXELS = 64  # pixels of a 2-D kernel in one program
_TILE = 4096  # elements of a tile


@triton.jit
def _seen(basis, kernel, pixel, tap, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, MAP: tl.constexpr, valid):
    """What pixel ``pixel`` of a 2-D kernel sees of kernel ``kernel`` of the basis through tap ``tap`` of the map."""
    h = pixel // KERNEL_W + tap // MAP - MAP // 2
    w = pixel % KERNEL_W + tap % MAP - MAP // 2
    inside = valid & (h >= 0) & (h < KERNEL_H) & (w >= 0) & (w < KERNEL_W)
    return tl.load(basis + kernel * (KERNEL_H * KERNEL_W) + h * KERNEL_W + w, mask=inside, other=0)


@triton.jit
def wide_forward_kernel(
    basis, refocus, transformed, group_size,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, MAP: tl.constexpr, IDENTITY: tl.constexpr,
    ACCUMULATOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """W_t. Programs: (groups, 2-D kernels of a group in blocks; blocks of their pixels)."""
    blocks = tl.cdiv(group_size, BLOCK_N)
    first = (tl.program_id(0) // blocks).to(tl.int64) * group_size
    member = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    pixel = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    real, drawn = member < group_size, pixel < KERNEL_H * KERNEL_W
    length = group_size * (MAP * MAP)
    rows = refocus + (first + member)[:, None] * length
    products = tl.zeros((BLOCK_N, BLOCK_L, BLOCK_S), dtype=ACCUMULATOR)
    for start in range(0, length, BLOCK_L):
        entry = start + tl.arange(0, BLOCK_L)
        valid = entry < length
        weight = tl.load(rows + entry[None, :], mask=real[:, None] & valid[None, :], other=0)
        kernel = first + entry // (MAP * MAP)
        tap = entry % (MAP * MAP)
        seen = _seen(
            basis, kernel[:, None], pixel[None, :], tap[:, None], KERNEL_H, KERNEL_W, MAP,
            valid[:, None] & drawn[None, :],
        )  # fmt: skip
        products += weight.to(ACCUMULATOR)[:, :, None] * seen.to(ACCUMULATOR)[None, :, :]
    total = tl.sum(products, axis=1)
    at = (first + member)[:, None] * (KERNEL_H * KERNEL_W) + pixel[None, :]
    stored = real[:, None] & drawn[None, :]
    if IDENTITY:
        total += tl.load(basis + at, mask=stored, other=0).to(ACCUMULATOR)
    tl.store(transformed + at, total.to(transformed.dtype.element_ty), mask=stored)


@triton.jit
def wide_backward_kernel(
    grad_transformed, basis, grad_refocus, group_size,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, MAP: tl.constexpr,
    ACCUMULATOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """dW_r. Programs: (groups, 2-D kernels of a group in blocks; entries of a row in blocks)."""
    blocks = tl.cdiv(group_size, BLOCK_N)
    first = (tl.program_id(0) // blocks).to(tl.int64) * group_size
    member = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    entry = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    length = group_size * (MAP * MAP)
    real, valid = member < group_size, entry < length
    kernel, tap = first + entry // (MAP * MAP), entry % (MAP * MAP)
    total = tl.zeros((BLOCK_N, BLOCK_L), dtype=ACCUMULATOR)
    for pixel in range(KERNEL_H * KERNEL_W):
        grad = tl.load(grad_transformed + (first + member) * (KERNEL_H * KERNEL_W) + pixel, mask=real, other=0)
        seen = _seen(basis, kernel, pixel, tap, KERNEL_H, KERNEL_W, MAP, valid)
        total += grad.to(ACCUMULATOR)[:, None] * seen.to(ACCUMULATOR)[None, :]
    to = grad_refocus + (first + member)[:, None] * length + entry[None, :]
    tl.store(to, total.to(grad_refocus.dtype.element_ty), mask=real[:, None] & valid[None, :])


@triton.jit
def narrow_forward_kernel(
    basis, refocus, transformed, kernels, group_size,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, MAP: tl.constexpr, IDENTITY: tl.constexpr,
    ACCUMULATOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """W_t. Programs: (2-D kernels in blocks, blocks of their pixels)."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    pixel = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    stored = (n < kernels)[:, None] & (pixel < KERNEL_H * KERNEL_W)[None, :]
    at = n[:, None] * (KERNEL_H * KERNEL_W) + pixel[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_S), dtype=ACCUMULATOR)
    if IDENTITY:
        total += tl.load(basis + at, mask=stored, other=0).to(ACCUMULATOR)
    for j in range(group_size):
        kernel = n // group_size * group_size + j
        rows = refocus + (n * group_size + j) * (MAP * MAP)
        for tap in range(MAP * MAP):
            weight = tl.load(rows + tap, mask=n < kernels, other=0)
            seen = _seen(basis, kernel[:, None], pixel[None, :], tap, KERNEL_H, KERNEL_W, MAP, stored)
            total += weight.to(ACCUMULATOR)[:, None] * seen.to(ACCUMULATOR)
    tl.store(transformed + at, total.to(transformed.dtype.element_ty), mask=stored)


@triton.jit
def narrow_backward_kernel(
    grad_transformed, basis, grad_refocus, kernels, group_size,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, MAP: tl.constexpr,
    ACCUMULATOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dW_r. Programs: (2-D kernels in blocks, members of a group)."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.program_id(1)
    tap = tl.arange(0, BLOCK_T)
    stored = (n < kernels)[:, None] & (tap < MAP * MAP)[None, :]
    kernel = (n // group_size * group_size + j)[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_T), dtype=ACCUMULATOR)
    for pixel in range(KERNEL_H * KERNEL_W):
        grad = tl.load(grad_transformed + n * (KERNEL_H * KERNEL_W) + pixel, mask=n < kernels, other=0)
        seen = _seen(basis, kernel, pixel, tap[None, :], KERNEL_H, KERNEL_W, MAP, stored)
        total += grad.to(ACCUMULATOR)[:, None] * seen.to(ACCUMULATOR)
    to = grad_refocus + ((n * group_size + j) * (MAP * MAP))[:, None] + tap[None, :]
    tl.store(to, total.to(grad_refocus.dtype.element_ty), mask=stored)


# --- launches ------------------------------------------------------------------------------------------------


def forward(basis: Tensor, refocus: Tensor, identity: bool, dtype: torch.dtype | None = None) -> Tensor:
    """``W_t`` in the shape of ``basis``, and in ``dtype``; arguments as in the operator ``refocus_weight``."""
    basis, refocus = basis.contiguous(), refocus.contiguous()
    kernels, group_size, map_size, _ = refocus.shape
    transformed = torch.empty_like(basis, dtype=dtype)
    if transformed.numel() == 0:
        return transformed
    pixels = basis.shape[2] * basis.shape[3]
    block_s = min(power_of_2(pixels), _MOST_PIXELS)
    constants = {
        "KERNEL_H": basis.shape[2], "KERNEL_W": basis.shape[3], "MAP": map_size, "IDENTITY": identity,
        "ACCUMULATOR": accumulator(basis), "BLOCK_S": block_s,
    }  # fmt: skip
    with device_of(basis):
        if refocus[0].numel() >= _WIDE_ROW:
            block_n = min(power_of_2(group_size), 4)
            block_l = _TILE // (block_n * block_s)
            grid = (kernels // group_size * triton.cdiv(group_size, block_n), triton.cdiv(pixels, block_s))
            wide_forward_kernel[grid](
                basis, refocus, transformed, group_size, **constants,
                BLOCK_N=block_n, BLOCK_L=block_l, **options(basis),
            )  # fmt: skip
        else:
            block_n = 1024 // block_s
            grid = (triton.cdiv(kernels, block_n), triton.cdiv(pixels, block_s))
            narrow_forward_kernel[grid](
                basis, refocus, transformed, kernels, group_size, **constants, BLOCK_N=block_n, **options(basis)
            )
    return transformed


def backward(grad_transformed: Tensor, basis: Tensor, group_size: int, map_size: int) -> Tensor:
    """``dW_r`` ``[N, g, k, k]``; arguments as in the operator ``refocus_weight_backward``."""
    grad_transformed, basis = grad_transformed.contiguous(), basis.contiguous()
    kernels, taps = basis.shape[0] * basis.shape[1], map_size * map_size
    grad_refocus = basis.new_empty(kernels, group_size, map_size, map_size)
    if grad_refocus.numel() == 0:
        return grad_refocus
    constants = {
        "KERNEL_H": basis.shape[2], "KERNEL_W": basis.shape[3], "MAP": map_size,
        "ACCUMULATOR": accumulator(basis),
    }  # fmt: skip
    with device_of(basis):
        if group_size * taps >= _WIDE_ROW:
            block_n, block_l = min(power_of_2(group_size), 4), 256
            grid = (kernels // group_size * triton.cdiv(group_size, block_n), triton.cdiv(group_size * taps, block_l))
            wide_backward_kernel[grid](
                grad_transformed, basis, grad_refocus, group_size, **constants,
                BLOCK_N=block_n, BLOCK_L=block_l, **options(basis),
            )  # fmt: skip
        else:
            block_t = power_of_2(taps)
            block_n = 1024 // block_t
            narrow_backward_kernel[(triton.cdiv(kernels, block_n), group_size)](
                grad_transformed, basis, grad_refocus, kernels, group_size, **constants,
                BLOCK_N=block_n, BLOCK_T=block_t, **options(basis),
            )  # fmt: skip
    return grad_refocus
