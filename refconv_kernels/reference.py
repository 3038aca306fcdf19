"""The paper's equations in plain PyTorch: the single source of truth. Imports only torch.

Every kernel of every backend is tested against these functions in float64, and every case that no kernel
covers runs on them. Nothing here validates its arguments; :mod:`refconv_kernels.functional` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten


def refocus_weight(basis: Tensor, refocus: Tensor, identity: bool) -> Tensor:
    """``W_t = W_b * W_r + W_b`` (Eq. 1), a grouped convolution over the 2-D kernels as channels (Eq. 2).

    ``basis`` is ``[C_out, C_in/g, K_h, K_w]``, ``refocus`` ``[N, g, k, k]`` with ``N = C_out * C_in / g``.
    The result has the shape of ``basis`` and is contiguous.
    """
    kernels, group_size, map_size, _ = refocus.shape
    image = basis.reshape(1, kernels, *basis.shape[2:])
    moved = torch.nn.functional.conv2d(image, refocus, padding=map_size // 2, groups=kernels // group_size).reshape(
        basis.shape
    )
    return basis + moved if identity else moved


def refocus_weight_backward(
    grad: Tensor, basis: Tensor, refocus: Tensor, identity: bool, need_basis: bool, need_refocus: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`refocus_weight` with respect to ``basis`` and ``refocus``, where wanted."""
    kernels, group_size, map_size, _ = refocus.shape
    pad = [map_size // 2] * 2
    image = [1, kernels, *basis.shape[2:]]
    grad_basis, grad_refocus, _ = aten.convolution_backward(
        grad.reshape(image),
        basis.reshape(image),
        refocus,
        None,
        [1, 1],
        pad,
        [1, 1],
        False,
        [0, 0],
        kernels // group_size,
        [need_basis, need_refocus, False],
    )
    if need_basis:
        grad_basis = grad_basis.reshape(basis.shape)
        grad_basis = grad_basis + grad if identity else grad_basis
    return grad_basis, grad_refocus


def thin_refocus_weight(basis: Tensor, coordinates: Tensor, factor: Tensor, identity: bool) -> Tensor:
    """``W_t = E R + W_b``, the thin form of Eq. 1 (docs/numerics.md): one matrix product per refocus group.

    ``basis`` is ``[C_out, C_in/g, K_h, K_w]``, ``coordinates`` ``[N, r]``, ``factor`` ``[N / g, r, K_h * K_w]``.
    The result has the shape of ``basis`` and is contiguous.
    """
    groups, rank, _ = factor.shape
    moved = (coordinates.reshape(groups, -1, rank) @ factor).reshape(basis.shape)
    return basis + moved if identity else moved


def thin_refocus_weight_backward(grad: Tensor, factor: Tensor) -> Tensor:
    """Gradient of :func:`thin_refocus_weight` with respect to ``coordinates``: ``dE = dW_t R^T``, ``[N, r]``."""
    groups, rank, size = factor.shape
    return (grad.reshape(groups, -1, size) @ factor.transpose(1, 2)).reshape(-1, rank)


def thin_factor_gradient(grad: Tensor, coordinates: Tensor, factor: Tensor) -> Tensor:
    """Gradient of :func:`thin_refocus_weight` with respect to ``factor``: ``E^T dW_t`` per refocus group."""
    groups, rank, size = factor.shape
    return coordinates.reshape(groups, -1, rank).transpose(1, 2) @ grad.reshape(groups, -1, size)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """The feature-map convolution, ``torch.nn.functional.conv2d``."""
    return torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)


def conv2d_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`conv2d` with respect to ``input``, ``weight`` and the bias, where wanted."""
    return aten.convolution_backward(
        grad, input, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, list(needs)
    )


def refconv2d(
    input: Tensor,
    basis: Tensor,
    refocus: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    identity: bool = True,
) -> Tensor:
    """``y = conv2d(x, W_b * W_r + W_b)``: the two-convolution formulation of the paper."""
    return conv2d(input, refocus_weight(basis, refocus, identity), bias, stride, padding, dilation, groups)
