"""The mathematics of the thin form: coordinates of ``W_r`` in the space that the basis sees. Imports only torch.

Per refocus group, Eq. 1 is ``W_t = W_b + W_r U`` with ``U`` the unfolded basis, ``[g k^2, P]`` for kernels of
``P = K_h K_w`` pixels. ``U = Q R`` with orthonormal columns in ``Q``, so ``W_t = W_b + E R`` with ``E = W_r Q``. What
of ``W_r`` is orthogonal to ``Q`` never reaches ``W_t``. Derivation and consequences: docs/numerics.md.

Everything is computed in float64, on the CPU: once per layer, and alike on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_BLOCK = 1 << 20  # entries of W_r at a time


def is_smaller(group_size: int, map_size: int, kernel_size: int) -> bool:
    """Whether ``E`` has fewer numbers than ``W_r``. Where not, ``Q`` is the identity: ``E = W_r``."""
    return group_size * map_size**2 > kernel_size


def unfold(basis: Tensor, group_size: int, map_size: int) -> Tensor:
    """``U`` of every refocus group, ``[N/g, g k^2, K_h K_w]``: row ``(j, tap)`` is what that tap sees of kernel j."""
    kernels = basis.shape[0] * basis.shape[1]
    image = basis.detach().cpu().double().reshape(1, kernels, *basis.shape[2:])
    seen = torch.nn.functional.unfold(image, map_size, padding=map_size // 2)
    return seen.reshape(kernels // group_size, group_size * map_size**2, -1)


def decompose(basis: Tensor, group_size: int, map_size: int) -> tuple[Tensor, Tensor]:
    """``(Q, R)`` of every refocus group, ``[N/g, g k^2, r]`` and ``[N/g, r, K_h K_w]``, in float64 on the CPU.

    The polar decomposition where that makes ``E`` smaller: its ``R``, the symmetric square root of ``U^T U``, is unique
    whatever the rank of ``U``, so ``E`` means the same on every machine.
    """
    seen = unfold(basis, group_size, map_size)
    groups, rows, columns = seen.shape
    if not is_smaller(group_size, map_size, columns):
        return torch.eye(rows, dtype=torch.float64).expand(groups, rows, rows), seen
    left, values, right = torch.linalg.svd(seen, full_matrices=False)
    return left @ right, right.transpose(1, 2) @ (values.unsqueeze(-1) * right)


def factor(basis: Tensor, group_size: int, map_size: int) -> Tensor:
    """``R`` in the dtype and on the device of ``basis``."""
    if basis.is_meta:
        kernels, size = basis.shape[0] * basis.shape[1], basis.shape[2] * basis.shape[3]
        return basis.new_empty(kernels // group_size, min(group_size * map_size**2, size), size)
    return decompose(basis, group_size, map_size)[1].to(basis)


def is_factor(stored: Tensor, factor: Tensor) -> bool:
    """Whether ``stored``, rounded, is the ``factor`` that :func:`decompose` gives, to half of its digits."""
    if stored.shape != factor.shape:
        return False
    allowed = torch.finfo(stored.dtype).eps ** 0.5 * factor.abs().max()
    return bool((stored.detach().cpu().double() - factor).abs().max() <= allowed)


def project(refocus: Tensor, rotation: Tensor) -> Tensor:
    """``E = W_r Q``, ``[N, r]``, from ``W_r [N, g, k, k]`` or anything that is linear in it, such as a momentum."""
    rows = refocus.detach().reshape(refocus.shape[0], -1)
    return _product(lambda begin, end: rows[begin:end], len(rows), rotation).to(refocus)


def project_uniform(bound: float, kernels: int, rotation: Tensor, dtype: torch.dtype) -> Tensor:
    """``E = W_r Q`` for ``W_r`` uniform in ``[-bound, bound]``: the numbers that ``uniform_`` draws on the CPU for the
    whole ``W_r``, a block of rows at a time."""
    row = rotation.shape[1]
    draw = lambda begin, end: torch.empty(end - begin, row, dtype=dtype).uniform_(-bound, bound)  # noqa: E731
    return _product(draw, kernels, rotation).to(dtype)


def lift(coordinates: Tensor, rotation: Tensor, map_size: int) -> Tensor:
    """``W_r = E Q^T``, ``[N, g, k, k]``: of all that give these coordinates, the smallest."""
    rows = coordinates.detach()
    result = _product(lambda begin, end: rows[begin:end], len(rows), rotation.transpose(1, 2))
    return result.to(coordinates).reshape(len(rows), -1, map_size, map_size)


def _product(rows: Callable[[int, int], Tensor], count: int, matrices: Tensor) -> Tensor:
    """``rows(0, count)``, ``[N, n]``, times one matrix ``[n, m]`` per refocus group, in float64.

    Rows are asked for in order, in blocks of whole groups or within one group, so that memory is bounded.
    """
    groups, inner, columns = matrices.shape
    result = torch.empty(count, columns, dtype=torch.float64)
    for begin, end, group, last_group in row_blocks(count, groups, max(inner, columns)):
        block = rows(begin, end).cpu().double().reshape(last_group - group, -1, inner)
        result[begin:end] = (block @ matrices[group:last_group]).reshape(end - begin, columns)
    return result


def row_blocks(count: int, groups: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """``count`` rows in order, ``(begin, end, first group, end of groups)``, in blocks of at most 2^20 entries if each
    row has ``width`` of them: whole refocus groups, or within one."""
    per_group = count // groups
    fit = max(1, _BLOCK // width)
    for first in range(0, count, span := max(1, fit // per_group) * per_group):
        last = min(first + span, count)
        for begin in range(first, last, step := span if fit >= per_group else fit):
            end = min(begin + step, last)
            yield begin, end, begin // per_group, (end - 1) // per_group + 1
