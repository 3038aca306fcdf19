"""The mathematics of AdamW on ``W_r`` in the coordinates of the thin form. Imports only torch and :mod:`thin`.

Entry ``j`` of a row of ``dW_r`` is ``dE . Q_j``, with ``dE`` that row of the gradient of ``E [N, r]`` and ``Q_j`` row
``j`` of ``Q`` (:mod:`refconv_kernels.thin`). So Adam's moments of all ``g k^2`` entries follow from ``r + r(r+1)/2``
numbers per row: the first is ``m . Q_j`` with ``m`` the running average of ``dE``, the second ``Q_j^T S Q_j`` with
``S`` that of ``dE dE^T``. Kept is not ``S`` but its root, the upper triangular ``U`` with ``S = U^T U``: the second
moment is then ``|U Q_j|^2``, never negative, and its square root as accurate as ``U`` (docs/numerics.md).

A root is packed: ``[N, r(r+1)/2]``, the rows of ``U`` from the diagonal on, one after the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from refconv_kernels.thin import row_blocks

_NOTHING = 1e-140  # lengths below it are no rotation: their squares would not be numbers


def root_size(rank: int) -> int:
    """Numbers of a packed root."""
    return rank * (rank + 1) // 2


def update_root(root: Tensor, rows: Tensor, keep: float) -> Tensor:
    """The root of ``keep S + (1 - keep) x x^T``, from the root of ``S [N, r(r+1)/2]`` and ``x [N, r]``.

    One rotation for each of the ``r`` rows of ``U``, in float64: nothing is subtracted that would leave few digits.
    """
    work, rest = root.double() * math.sqrt(keep), rows.double() * math.sqrt(1 - keep)
    begin, rank = 0, rows.shape[1]
    for k in range(rank):
        row = work[:, begin : begin + rank - k]
        length = torch.hypot(row[:, :1], rest[:, :1])
        nothing = length < _NOTHING
        cosine = (row[:, :1] / length).masked_fill_(nothing, 1)
        sine = (rest[:, :1] / length).masked_fill_(nothing, 0)
        rotated = cosine * row + sine * rest
        rest = (cosine * rest - sine * row)[:, 1:]
        row.copy_(rotated)
        begin += rank - k
    return work.to(root.dtype)


def direction(
    first: Tensor, root: Tensor, rotation: Tensor, scale_first: float, scale_second: float, eps: float
) -> Tensor:
    """Adam's direction on ``W_r``, projected: ``sum_j ratio_j Q_j``, ``[N, r]``, with
    ``ratio_j = scale_first (m . Q_j) / (scale_second |U Q_j| + eps)``; 0 where that is 0/0.

    ``first`` is ``m [N, r]``, ``root`` packed ``U``, ``rotation`` ``Q`` transposed, ``[N/g, r, g k^2]``; all of one
    dtype, float32 or float64, in which everything is computed.
    """
    groups, rank, _ = rotation.shape
    result = torch.empty_like(first)
    for begin, end, group, last_group in row_blocks(len(first), groups, rotation.shape[2]):
        columns = rotation[group:last_group]
        moments, packed = (t[begin:end].reshape(last_group - group, -1, t.shape[1]) for t in (first, root))
        second, at = torch.zeros((), dtype=first.dtype, device=first.device), 0
        for k in range(rank):
            seen = packed[:, :, at : at + rank - k] @ columns[:, k:]
            second = torch.addcmul(second, seen, seen)
            at += rank - k
        below = second.sqrt_().mul_(scale_second).add_(eps)
        ratio = (moments @ columns).mul_(scale_first).div_(below).masked_fill_(below == 0, 0)
        result[begin:end] = (ratio @ columns.transpose(1, 2)).reshape(end - begin, rank)
    return result
