"""Transformed weights, in the full and in the thin form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from refconv_kernels import reference, thin
from refconv_kernels.autocast import HALVES, no_autocast
from refconv_kernels.autograd import RefocusWeight, ThinRefocusWeight, apply, native
from refconv_kernels.checks import check_basis, check_dims, check_same, check_tensors
from refconv_kernels.geometry import output_format
from refconv_kernels.ops import choose, recall, remember


def refocus_weight(basis: Tensor, refocus: Tensor, *, identity: bool = True) -> Tensor:
    """Transformed weights ``W_t = W_b * W_r + W_b`` (RefConv, Eq. 1), with the groups of Eq. 2.

    ``*`` is a stride-1 cross-correlation with zero padding ``k // 2`` over the 2-D kernels of the basis as
    channels. Each refocus group mixes ``g`` consecutive kernels in row-major ``(out, in)`` order.

    Equivalent to::

        N, g, k, _ = refocus.shape
        image = basis.reshape(1, N, *basis.shape[2:])
        moved = F.conv2d(image, refocus, padding=k // 2, groups=N // g)
        return basis + moved.reshape(basis.shape)

    Args:
        basis: basis weights ``W_b``, ``[C_out, C_in/g, K_h, K_w]``; any floating or complex dtype.
        refocus: refocusing weights ``W_r``, ``[N, g, k, k]`` with ``N = C_out * C_in/g`` and odd ``k``; dtype
            and device of ``basis``.
        identity: add ``W_b`` itself; False is the paper's "w/o shortcut".

    Returns:
        ``W_t`` in the shape, dtype and memory format of ``basis``. bfloat16 and float16 are computed in
        float32 and rounded once; autocast does not apply.

    Raises:
        TypeError: an argument is not a tensor, or the dtypes differ.
        ValueError: shapes or devices do not fit.

    Example:
        >>> basis = torch.randn(8, 1, 3, 3)                     # depthwise, 8 channels
        >>> refocus_weight(basis, torch.zeros(8, 8, 3, 3)).shape
        torch.Size([8, 1, 3, 3])
    """
    call = native.REFOCUS_WEIGHT, (basis, refocus), identity
    output = native.call(*call)
    if output is not None:
        return output
    try:
        problem: Any = basis.shape, refocus.shape, basis.dtype, refocus.dtype, basis.device, refocus.device
        backend = recall(problem)
    except (AttributeError, TypeError):  # no tensors, or symbolic sizes
        problem = backend = None
    if backend is not None and basis.is_contiguous():
        native.remember(backend, True, *call)
        return apply(RefocusWeight, basis, refocus, identity, backend)

    check_tensors(basis=basis, refocus=refocus)
    check_dims("basis", basis, 4, "[C_out, C_in/g, K_h, K_w]")
    check_dims("refocus", refocus, 4, "[N, g, k, k]")
    kernels, group_size, map_size, map_width = refocus.shape
    if map_size != map_width or map_size % 2 == 0:
        raise ValueError(f"refocus.shape[2:] (={(map_size, map_width)}) must be square and odd")
    if kernels != basis.shape[0] * basis.shape[1]:
        raise ValueError(
            f"refocus.shape[0] (={kernels}) must be the number of 2-D kernels in basis, "
            f"{basis.shape[0]} * {basis.shape[1]} = {basis.shape[0] * basis.shape[1]}"
        )
    if group_size == 0 or kernels % group_size != 0:
        raise ValueError(f"refocus.shape[0] (={kernels}) must be divisible by refocus.shape[1] (={group_size})")
    check_same("refocus", refocus, "basis", basis)

    dtype = basis.dtype
    backend = choose("refocus_weight", basis, refocus, optional=dtype in HALVES)
    if backend == "reference" and dtype in HALVES:
        basis, refocus = basis.float(), refocus.float()
        backend = choose("refocus_weight", basis, refocus)
    if backend == "reference":
        with no_autocast(basis):
            transformed = reference.refocus_weight(basis, refocus, identity)
    else:
        if problem is not None:
            remember(problem, backend)
        if basis.is_contiguous():
            native.remember(backend, True, *call)
        transformed = apply(RefocusWeight, basis, refocus, identity, backend)
    return _like(transformed, basis, dtype)


def refocus_factor(basis: Tensor, groups: int, map_size: int = 3) -> Tensor:
    """The factor ``R`` of the thin form: ``W_b * W_r = E R`` with ``E = W_r Q`` and ``U = Q R`` (docs/numerics.md).

    ``U``, ``[g k^2, K_h K_w]`` per refocus group, is the basis unfolded, so that Eq. 1 is ``W_t = W_r U + W_b``. Where
    ``g k^2 > K_h K_w``, ``Q R`` is its polar decomposition: ``R`` is the symmetric square root of ``U^T U``, which is
    unique, and ``Q`` has orthonormal columns. Elsewhere ``Q`` is the identity and ``R`` is ``U`` itself.

    Args:
        basis: basis weights ``W_b``, ``[C_out, C_in/g, K_h, K_w]``, of any rank; float32, float64, bfloat16 or float16.
        groups: ``g``, the convolution's groups; divides the number of 2-D kernels.
        map_size: ``k``, odd.

    Returns:
        ``R``, ``[N/g, r, K_h K_w]`` with ``N = C_out * C_in/g`` and ``r = min(g k^2, K_h K_w)``; computed in float64,
        then in the dtype and on the device of ``basis``. Not differentiable.

    Raises:
        TypeError: ``basis`` is not a real floating-point tensor.
        ValueError: shapes do not fit.

    Example:
        >>> refocus_factor(torch.randn(8, 1, 3, 3), groups=8).shape
        torch.Size([1, 9, 9])
    """
    check_basis(basis, groups, map_size)
    return thin.factor(basis, groups, map_size)


def thin_refocus_weight(basis: Tensor, coordinates: Tensor, factor: Tensor, *, identity: bool = True) -> Tensor:
    """Transformed weights in the thin form, ``W_t = E R + W_b``: Eq. 1 in ``C_out C_in/g K_h K_w`` trained numbers.

    With ``R = refocus_factor(basis, groups)`` and ``E = W_r Q`` this is ``refocus_weight(basis, W_r)``, and SGD on
    ``E`` is SGD on ``W_r`` (docs/numerics.md). Not in the paper.

    Equivalent to::

        groups, rank, _ = factor.shape
        moved = coordinates.reshape(groups, -1, rank) @ factor
        return basis + moved.reshape(basis.shape)

    Args:
        basis: basis weights ``W_b``, ``[C_out, C_in/g, K_h, K_w]``; any floating or complex dtype.
        coordinates: ``E``, ``[N, r]`` with ``N = C_out * C_in/g``; dtype and device of ``basis``.
        factor: ``R``, ``[N/g, r, K_h K_w]``; dtype and device of ``basis``.
        identity: add ``W_b`` itself; False is the paper's "w/o shortcut".

    Returns:
        ``W_t`` in the shape, dtype and memory format of ``basis``. bfloat16 and float16 are computed in
        float32 and rounded once; autocast does not apply.

    Raises:
        TypeError: an argument is not a tensor, or the dtypes differ.
        ValueError: shapes or devices do not fit.

    Example:
        >>> basis = torch.randn(8, 1, 3, 3)
        >>> thin_refocus_weight(basis, torch.zeros(8, 9), refocus_factor(basis, groups=8)).shape
        torch.Size([8, 1, 3, 3])
    """
    call = native.THIN_REFOCUS_WEIGHT, (basis, coordinates, factor), identity
    output = native.call(*call)
    if output is not None:
        return output
    check_tensors(basis=basis, coordinates=coordinates, factor=factor)
    check_dims("basis", basis, 4, "[C_out, C_in/g, K_h, K_w]")
    check_dims("coordinates", coordinates, 2, "[N, r]")
    check_dims("factor", factor, 3, "[N/g, r, K_h * K_w]")
    kernels, size = basis.shape[0] * basis.shape[1], basis.shape[2] * basis.shape[3]
    if coordinates.shape[0] != kernels:
        raise ValueError(
            f"coordinates.shape[0] (={coordinates.shape[0]}) must be the number of 2-D kernels in basis, "
            f"{basis.shape[0]} * {basis.shape[1]} = {kernels}"
        )
    if factor.shape[1:] != (coordinates.shape[1], size):
        raise ValueError(
            f"factor.shape[1:] (={tuple(factor.shape[1:])}) must be (r, K_h * K_w) = {(coordinates.shape[1], size)}"
        )
    if factor.shape[0] == 0 or kernels % factor.shape[0] != 0:
        raise ValueError(f"factor.shape[0] (={factor.shape[0]}) must divide the number of 2-D kernels (={kernels})")
    check_same("coordinates", coordinates, "basis", basis)
    check_same("factor", factor, "basis", basis)

    dtype = basis.dtype
    backend = choose("thin_refocus_weight", basis, coordinates, factor)
    if backend == "reference":
        if dtype in HALVES:
            basis, coordinates, factor = basis.float(), coordinates.float(), factor.float()
        with no_autocast(basis):
            transformed = reference.thin_refocus_weight(basis, coordinates, factor, identity)
    else:
        if basis.is_contiguous():
            native.remember(backend, True, *call)
        transformed = apply(ThinRefocusWeight, basis, coordinates, factor, identity, backend)
    return _like(transformed, basis, dtype)


def _like(transformed: Tensor, basis: Tensor, dtype: torch.dtype) -> Tensor:
    """``transformed`` in ``dtype`` and the memory format of ``basis``."""
    if transformed.dtype == dtype and basis.is_contiguous():
        return transformed
    return transformed.to(dtype, memory_format=output_format(basis))
