"""A layer, both steps in one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from refconv_kernels import reference
from refconv_kernels.autograd.calls import apply
from refconv_kernels.autograd.convolution import GroupedConv2dBackward
from refconv_kernels.autograd.weights import (
    RefocusWeight,
    RefocusWeightBackward,
    ThinRefocusWeight,
    ThinRefocusWeightBackward,
    basis_gradient,
)
from refconv_kernels.geometry import Pair
from refconv_kernels.ops import KERNELS


class RefConv2d(Function):
    """``(y, W_t)`` from ``(x, W_b, W_r, bias)``, grouped, batched: both steps in one operator. ``W_t`` is not
    differentiable; it is returned for the backward."""

    @staticmethod
    def forward(
        input: Tensor,
        basis: Tensor,
        refocus: Tensor,
        bias: Tensor | None,
        identity: bool,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        return KERNELS["refconv2d"][backend].forward(input, basis, refocus, bias, identity, stride, padding, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, basis, refocus, _, ctx.identity, *ctx.geometry, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, basis, refocus, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        input, basis, refocus, transformed = ctx.saved_tensors
        needs = need_input, need_basis, need_refocus, need_bias = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # second derivatives: the two steps one by one
            transformed = apply(RefocusWeight, basis, refocus, ctx.identity, ctx.backend)
            wanted = need_input, need_basis or need_refocus, need_bias
            arguments = grad, input, transformed, *ctx.geometry, *wanted, ctx.backend
            grad_input, grad_weight, grad_bias = apply(GroupedConv2dBackward, *arguments)
            sizes = refocus.shape[1:3]
            grad_refocus = (
                apply(RefocusWeightBackward, grad_weight, basis, *sizes, ctx.backend) if need_refocus else None
            )
        else:
            run = KERNELS["refconv2d"][ctx.backend].backward
            arguments = grad, input, transformed, basis, *refocus.shape[1:3], *ctx.geometry, *needs
            grad_input, grad_weight, grad_refocus, grad_bias = run(*arguments)
        grad_basis: Tensor | None = None
        if need_basis:
            grad_basis = basis_gradient(grad_weight, basis, refocus, ctx.identity)
        grads = (grad_input, grad_basis, grad_refocus, grad_bias)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 5


class ThinRefConv2d(Function):
    """``y`` from ``(x, W_b, E, R, bias)``, grouped, batched: both steps in one operator. The backward makes
    ``W_t`` again: that is cheaper than to keep it."""

    @staticmethod
    def forward(
        input: Tensor,
        basis: Tensor,
        coordinates: Tensor,
        factor: Tensor,
        bias: Tensor | None,
        identity: bool,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        backend: str,
    ) -> Tensor:
        run = KERNELS["thin_refconv2d"][backend].forward
        return run(input, basis, coordinates, factor, bias, identity, stride, padding, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, _, ctx.identity = inputs[:6]
        *ctx.geometry, ctx.backend = inputs[6:]
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, basis, coordinates, factor = ctx.saved_tensors
        needs = need_input, need_basis, need_coordinates, need_factor, need_bias = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():  # second derivatives: the two steps one by one
            wanted = need_input, need_basis or need_coordinates or need_factor, need_bias
            transformed = apply(ThinRefocusWeight, basis, coordinates, factor, ctx.identity, ctx.backend)
            arguments = grad, input, transformed, *ctx.geometry, *wanted, ctx.backend
            grad_input, grad_weight, grad_bias = apply(GroupedConv2dBackward, *arguments)
            grad_coordinates = None
            if need_coordinates:
                grad_coordinates = apply(ThinRefocusWeightBackward, grad_weight, factor, ctx.backend)
        else:
            run = KERNELS["thin_refconv2d"][ctx.backend].backward
            needed = need_input, need_basis or need_factor, need_coordinates, need_bias
            arguments = grad, input, basis, coordinates, factor, ctx.identity, *ctx.geometry, *needed
            grad_input, grad_weight, grad_coordinates, grad_bias = run(*arguments)
        grad_basis = grad_factor = None
        if need_basis:
            grad_basis = grad_weight if ctx.identity else torch.zeros_like(grad_weight)
        if need_factor:
            grad_factor = reference.thin_factor_gradient(grad_weight, coordinates, factor)
        grads = (grad_input, grad_basis, grad_coordinates, grad_factor, grad_bias)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 5
