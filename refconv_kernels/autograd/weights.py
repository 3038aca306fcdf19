"""Transformed weights, in the full and in the thin form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from refconv_kernels import reference
from refconv_kernels.autocast import HALVES
from refconv_kernels.autograd.calls import derive
from refconv_kernels.ops import KERNELS


def basis_gradient(grad: Tensor, basis: Tensor, refocus: Tensor, identity: bool) -> Tensor:
    """``dW_b`` from ``(dW_t, W_b, W_r)``, by the reference path; halves in float32, rounded once."""
    dtype = basis.dtype
    if dtype in HALVES:
        grad, basis, refocus = grad.float(), basis.float(), refocus.float()
    found, _ = reference.refocus_weight_backward(grad, basis, refocus, identity, True, False)
    assert found is not None
    return found.to(dtype)


class RefocusWeight(Function):
    """``W_t`` from ``(W_b, W_r)``."""

    @staticmethod
    def forward(basis: Tensor, refocus: Tensor, identity: bool, backend: str) -> Tensor:
        return KERNELS["refocus_weight"][backend].forward(basis, refocus, identity)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        basis, refocus, ctx.identity, ctx.backend = inputs
        ctx.save_for_backward(basis, refocus)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        basis, refocus = ctx.saved_tensors
        grad_basis = grad_refocus = None
        if ctx.needs_input_grad[0]:
            grad_basis = basis_gradient(grad, basis, refocus, ctx.identity)
        if ctx.needs_input_grad[1]:
            _, group_size, map_size, _ = refocus.shape
            grad_refocus = derive(RefocusWeightBackward, grad, basis, group_size, map_size, ctx.backend)
        return grad_basis, grad_refocus, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return torch.vmap(lambda b, r, i, _: reference.refocus_weight(b, r, i), in_dims)(*args), 0


class RefocusWeightBackward(Function):
    """``dW_r`` from ``(dW_t, W_b)``."""

    @staticmethod
    def forward(grad: Tensor, basis: Tensor, group_size: int, map_size: int, backend: str) -> Tensor:
        return KERNELS["refocus_weight"][backend].backward(grad, basis, group_size, map_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, basis, ctx.group_size, ctx.map_size, _ = inputs
        ctx.save_for_backward(grad, basis)

    @staticmethod
    def backward(ctx: Any, grad_grad_refocus: Tensor) -> tuple[Tensor | None, ...]:
        grad, basis = ctx.saved_tensors
        grad_grad = grad_basis = None
        if ctx.needs_input_grad[0]:
            grad_grad = reference.refocus_weight(basis, grad_grad_refocus, False)
        if ctx.needs_input_grad[1]:
            grad_basis = basis_gradient(grad, basis, grad_grad_refocus, False)
        return grad_grad, grad_basis, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        def one(grad: Tensor, basis: Tensor, group_size: int, map_size: int, _: str) -> Any:
            refocus = basis.new_zeros(basis.shape[0] * basis.shape[1], group_size, map_size, map_size)
            return reference.refocus_weight_backward(grad, basis, refocus, False, False, True)[1]

        return torch.vmap(one, in_dims)(*args), 0


class ThinRefocusWeight(Function):
    """``W_t`` from ``(W_b, E, R)``."""

    @staticmethod
    def forward(basis: Tensor, coordinates: Tensor, factor: Tensor, identity: bool, backend: str) -> Tensor:
        return KERNELS["thin_refocus_weight"][backend].forward(basis, coordinates, factor, identity)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, coordinates, factor, ctx.identity, ctx.backend = inputs
        ctx.save_for_backward(coordinates, factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        coordinates, factor = ctx.saved_tensors
        grad_basis = grad_coordinates = grad_factor = None
        if ctx.needs_input_grad[0]:
            grad_basis = grad if ctx.identity else torch.zeros_like(grad)
        if ctx.needs_input_grad[1]:
            grad_coordinates = derive(ThinRefocusWeightBackward, grad, factor, ctx.backend)
        if ctx.needs_input_grad[2]:
            grad_factor = reference.thin_factor_gradient(grad, coordinates, factor)
        return grad_basis, grad_coordinates, grad_factor, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return torch.vmap(lambda b, e, r, i, _: reference.thin_refocus_weight(b, e, r, i), in_dims)(*args), 0


class ThinRefocusWeightBackward(Function):
    """``dE`` from ``(dW_t, R)``."""

    @staticmethod
    def forward(grad: Tensor, factor: Tensor, backend: str) -> Tensor:
        return KERNELS["thin_refocus_weight"][backend].backward(grad, factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, factor, _ = inputs
        ctx.save_for_backward(grad, factor)

    @staticmethod
    def backward(ctx: Any, grad_grad_coordinates: Tensor) -> tuple[Tensor | None, ...]:
        grad, factor = ctx.saved_tensors
        grad_grad = grad_factor = None
        if ctx.needs_input_grad[0]:
            grad_grad = reference.thin_refocus_weight(grad, grad_grad_coordinates, factor, False)
        if ctx.needs_input_grad[1]:
            grad_factor = reference.thin_factor_gradient(grad, grad_grad_coordinates, factor)
        return grad_grad, grad_factor, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return torch.vmap(lambda g, r, _: reference.thin_refocus_weight_backward(g, r), in_dims)(*args), 0
