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
from refconv_kernels.geometry import Geometry, Pair
from refconv_kernels.ops import KERNELS


class RefConv2d(Function):
    """``(y, W_t)`` from ``(x, W_b, W_r, bias)``, batched: both steps in one operator. ``W_t``, in the type of ``x``, is
    not differentiable; it is returned for the backward. ``own``: the convolution is the backend's, not PyTorch's."""

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
        own: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        run = KERNELS["refconv2d"][backend].forward
        return run(input, basis, refocus, bias, identity, stride, padding, dilation, own)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, basis, refocus, _, ctx.identity, *ctx.geometry, ctx.own, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, basis, refocus, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 10
        input, basis, refocus, transformed = ctx.saved_tensors
        needs = need_input, need_basis, need_refocus, need_bias = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # second derivatives: the two steps one by one
            transformed = apply(RefocusWeight, basis, refocus, ctx.identity, ctx.backend)
            wanted = need_input, need_basis or need_refocus, need_bias
            grad_input, grad_weight, grad_bias = _convolution_backward(ctx, grad, input, transformed, wanted)
            sizes = refocus.shape[1:3]
            grad_refocus = (
                apply(RefocusWeightBackward, grad_weight, basis, *sizes, ctx.backend) if need_refocus else None
            )
        else:
            run = KERNELS["refconv2d"][ctx.backend].backward
            arguments = grad, input, transformed, basis, *refocus.shape[1:3], *ctx.geometry, *needs, ctx.own
            grad_input, grad_weight, grad_refocus, grad_bias = run(*arguments)
        grad_basis: Tensor | None = None
        if need_basis:
            grad_basis = basis_gradient(grad_weight, basis, refocus, ctx.identity)
        grads = (grad_input, grad_basis, grad_refocus, grad_bias)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 6


class ThinRefConv2d(Function):
    """``y`` from ``(x, W_b, E, R, bias)``, batched: both steps in one operator. The backward makes ``W_t`` again: that
    is cheaper than to keep it. ``own`` as above."""

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
        own: bool,
        backend: str,
    ) -> Tensor:
        run = KERNELS["thin_refconv2d"][backend].forward
        return run(input, basis, coordinates, factor, bias, identity, stride, padding, dilation, own)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, _, ctx.identity = inputs[:6]
        *ctx.geometry, ctx.own, ctx.backend = inputs[6:]
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, basis, coordinates, factor = ctx.saved_tensors
        needs = need_input, need_basis, need_coordinates, need_factor, need_bias = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():  # second derivatives: the two steps one by one
            wanted = need_input, need_basis or need_coordinates or need_factor, need_bias
            transformed = apply(ThinRefocusWeight, basis, coordinates, factor, ctx.identity, ctx.backend)
            grad_input, grad_weight, grad_bias = _convolution_backward(ctx, grad, input, transformed, wanted)
            grad_coordinates = None
            if need_coordinates:
                grad_coordinates = apply(ThinRefocusWeightBackward, grad_weight, factor, ctx.backend)
        else:
            run = KERNELS["thin_refconv2d"][ctx.backend].backward
            needed = need_input, need_basis or need_factor, need_coordinates, need_bias
            arguments = grad, input, basis, coordinates, factor, ctx.identity, *ctx.geometry, *needed, ctx.own
            grad_input, grad_weight, grad_coordinates, grad_bias = run(*arguments)
        grad_basis = grad_factor = None
        if need_basis:
            grad_basis = grad_weight if ctx.identity else torch.zeros_like(grad_weight)
        if need_factor:
            grad_factor = reference.thin_factor_gradient(grad_weight, coordinates, factor)
        grads = (grad_input, grad_basis, grad_coordinates, grad_factor, grad_bias)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 6


def _convolution_backward(
    ctx: Any, grad: Tensor, input: Tensor, transformed: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Any, ...]:
    """``(dx, dW_t, dbias)`` that can be differentiated again; the last two in the type of ``W_t``."""
    dtype = transformed.dtype  # under autocast another than the input's
    geometry: Geometry = tuple(ctx.geometry)
    weight, groups = transformed.to(input.dtype), input.shape[1] // transformed.shape[1]
    if ctx.own:
        dx, dw, db = apply(GroupedConv2dBackward, grad, input, weight, *geometry, *wanted, ctx.backend)
    else:
        dx, dw, db = reference.conv2d_backward(grad, input, weight, *geometry, groups, wanted)
    return dx, *(None if g is None else g.to(dtype) for g in (dw, db))
