"""The paper's equations and the convolution as explicit loops over numbers: what the reference is tested against."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def refocus_weight(basis: Tensor, refocus: Tensor, groups: int, identity: bool) -> Tensor:
    """Eq. 1 with the groups of Eq. 2: ``G = C_out * C_in / g^2`` groups of ``g`` consecutive 2-D kernels."""
    c_out, per_group, k_h, k_w = basis.shape
    kernels, k = c_out * per_group, refocus.shape[-1]
    refocus_groups = c_out * (per_group * groups) // groups**2
    members = kernels // refocus_groups
    flat = basis.reshape(kernels, k_h, k_w).tolist()
    w_r = refocus.tolist()
    out = torch.zeros(kernels, k_h, k_w, dtype=torch.float64)
    for n, h, w in itertools.product(range(kernels), range(k_h), range(k_w)):
        total = flat[n][h][w] if identity else 0.0
        for j, a, b in itertools.product(range(members), range(k), range(k)):
            row, col = h + a - k // 2, w + b - k // 2
            if 0 <= row < k_h and 0 <= col < k_w:
                total += w_r[n][j][a][b] * flat[n // members * members + j][row][col]
        out[n, h, w] = total
    return out.reshape(basis.shape)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """``nn.Conv2d`` with zero padding."""
    batch, c_in, height, width = input.shape
    c_out, per_group, k_h, k_w = weight.shape
    out_h = (height + 2 * padding[0] - dilation[0] * (k_h - 1) - 1) // stride[0] + 1
    out_w = (width + 2 * padding[1] - dilation[1] * (k_w - 1) - 1) // stride[1] + 1
    x, w = input.tolist(), weight.tolist()
    out = torch.zeros(batch, c_out, out_h, out_w, dtype=torch.float64)
    for n, o, i, j in itertools.product(range(batch), range(c_out), range(out_h), range(out_w)):
        total = 0.0 if bias is None else bias[o].item()
        first = o // (c_out // groups) * per_group
        for c, a, b in itertools.product(range(per_group), range(k_h), range(k_w)):
            row = i * stride[0] - padding[0] + a * dilation[0]
            col = j * stride[1] - padding[1] + b * dilation[1]
            if 0 <= row < height and 0 <= col < width:
                total += w[o][c][a][b] * x[n][first + c][row][col]
        out[n, o, i, j] = total
    assert c_in == per_group * groups
    return out
