"""Autograd Functions over the raw forward and backward operators.

Each operator is bilinear in its tensors, so the backward of a backward is again the same operator with
other arguments; those second derivatives, and forward-mode ones, take the reference path, which PyTorch
differentiates to any order. ``setup_context`` and ``vmap`` make the Functions work under ``torch.func``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from refconv_kernels import reference
from refconv_kernels.ops import KERNELS

Pair = tuple[int, int]


class RefocusWeight(Function):
    """``W_t`` from ``(W_b, W_r)``."""

    @staticmethod
    def forward(basis: Tensor, refocus: Tensor, identity: bool, backend: str) -> Tensor:
        return KERNELS["refocus_weight"][backend].forward(basis, refocus, identity)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        basis, refocus, ctx.identity, ctx.backend = inputs
        ctx.save_for_backward(basis, refocus)
        ctx.save_for_forward(basis, refocus)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        basis, refocus = ctx.saved_tensors
        grad_basis = grad_refocus = None
        if ctx.needs_input_grad[0]:
            grad_basis, _ = reference.refocus_weight_backward(grad, basis, refocus, ctx.identity, True, False)
        if ctx.needs_input_grad[1]:
            _, group_size, map_size, _ = refocus.shape
            grad_refocus = RefocusWeightBackward.apply(grad, basis, group_size, map_size, ctx.backend)
        return grad_basis, grad_refocus, None, None

    @staticmethod
    def jvp(ctx: Any, basis_t: Tensor | None, refocus_t: Tensor | None, *_: Any) -> Tensor:
        basis, refocus = ctx.saved_tensors
        terms = []
        if basis_t is not None:
            terms.append(reference.refocus_weight(basis_t, refocus, ctx.identity))
        if refocus_t is not None:
            terms.append(reference.refocus_weight(basis, refocus_t, False))
        return sum(terms[1:], terms[0])

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
        ctx.save_for_forward(grad, basis)

    @staticmethod
    def backward(ctx: Any, grad_grad_refocus: Tensor) -> tuple[Tensor | None, ...]:
        grad, basis = ctx.saved_tensors
        grad_grad = grad_basis = None
        if ctx.needs_input_grad[0]:
            grad_grad = reference.refocus_weight(basis, grad_grad_refocus, False)
        if ctx.needs_input_grad[1]:
            grad_basis, _ = reference.refocus_weight_backward(grad, basis, grad_grad_refocus, False, True, False)
        return grad_grad, grad_basis, None, None, None

    @staticmethod
    def _reference(grad: Tensor, basis: Tensor, group_size: int, map_size: int) -> Tensor | None:
        refocus = basis.new_zeros(basis.shape[0] * basis.shape[1], group_size, map_size, map_size)
        return reference.refocus_weight_backward(grad, basis, refocus, False, False, True)[1]

    @staticmethod
    def jvp(ctx: Any, grad_t: Tensor | None, basis_t: Tensor | None, *_: Any) -> Tensor:
        grad, basis = ctx.saved_tensors
        terms = []
        if grad_t is not None:
            terms.append(RefocusWeightBackward._reference(grad_t, basis, ctx.group_size, ctx.map_size))
        if basis_t is not None:
            terms.append(RefocusWeightBackward._reference(grad, basis_t, ctx.group_size, ctx.map_size))
        return sum(terms[1:], terms[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return torch.vmap(lambda *a: RefocusWeightBackward._reference(*a[:4]), in_dims)(*args), 0


class DepthwiseConv2d(Function):
    """``y`` from ``(x, W, bias)``, depthwise, batched."""

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, backend: str
    ) -> Tensor:
        return KERNELS["depthwise_conv2d"][backend].forward(input, weight, bias, stride, padding, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, *ctx.geometry, ctx.backend = inputs
        ctx.save_for_backward(input, weight)
        ctx.save_for_forward(input, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grads = DepthwiseConv2dBackward.apply(grad, input, weight, *ctx.geometry, *needs, ctx.backend)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, input_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None, *_: Any) -> Tensor:
        input, weight = ctx.saved_tensors
        groups = input.shape[1]
        terms = []
        if input_t is not None:
            terms.append(reference.conv2d(input_t, weight, None, *ctx.geometry, groups))
        if weight_t is not None:
            terms.append(reference.conv2d(input, weight_t, None, *ctx.geometry, groups))
        if bias_t is not None:
            zero = reference.conv2d(input, torch.zeros_like(weight), None, *ctx.geometry, groups)
            terms.append(zero + bias_t[:, None, None])
        return sum(terms[1:], terms[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        def one(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
            return reference.conv2d(input, weight, bias, *rest[:3], input.shape[1])

        return torch.vmap(one, in_dims)(*args), 0


class DepthwiseConv2dBackward(Function):
    """``(dx, dW, dbias)`` from ``(dy, x, W)``; what is not needed comes back empty."""

    @staticmethod
    def forward(
        grad: Tensor,
        input: Tensor,
        weight: Tensor,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        need_input: bool,
        need_weight: bool,
        need_bias: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        run = KERNELS["depthwise_conv2d"][backend].backward
        return run(grad, input, weight, stride, padding, dilation, need_input, need_weight, need_bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad, input, weight, *ctx.geometry, need_input, need_weight, need_bias, _ = inputs
        ctx.needs = (need_input, need_weight, need_bias)
        ctx.save_for_backward(grad, input, weight)
        ctx.save_for_forward(grad, input, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_dx: Tensor | None, grad_dw: Tensor | None, grad_db: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # dx is bilinear in (dy, W), dW in (dy, x), dbias linear in dy.
        grad, input, weight = ctx.saved_tensors
        groups = input.shape[1]
        grad_grad = grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            terms = []
            if grad_dx is not None:
                terms.append(reference.conv2d(grad_dx, weight, None, *ctx.geometry, groups))
            if grad_dw is not None:
                terms.append(reference.conv2d(input, grad_dw, None, *ctx.geometry, groups))
            if grad_db is not None:
                terms.append(grad_db[:, None, None].expand_as(grad))
            grad_grad = sum(terms[1:], terms[0]) if terms else None
        if ctx.needs_input_grad[1] and grad_dw is not None:
            grad_input = reference.conv2d_backward(
                grad, input, grad_dw, *ctx.geometry, groups, (True, False, False)
            )[0]
        if ctx.needs_input_grad[2] and grad_dx is not None:
            grad_weight = reference.conv2d_backward(
                grad, grad_dx, weight, *ctx.geometry, groups, (False, True, False)
            )[1]
        return grad_grad, grad_input, grad_weight, *(None,) * 7

    @staticmethod
    def _reference(
        grad: Tensor, input: Tensor, weight: Tensor, geometry: tuple[Pair, ...], needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor, ...]:
        grads = reference.conv2d_backward(grad, input, weight, *geometry, input.shape[1], needs)
        return tuple(g if g is not None else grad.new_empty(0) for g in grads)

    @staticmethod
    def jvp(
        ctx: Any, grad_t: Tensor | None, input_t: Tensor | None, weight_t: Tensor | None, *_: Any
    ) -> tuple[Tensor, ...]:
        grad, input, weight = ctx.saved_tensors
        need_input, need_weight, _need_bias = ctx.needs
        total = [torch.zeros_like(input), torch.zeros_like(weight), weight.new_zeros(weight.shape[0])]
        parts = []
        if grad_t is not None:
            parts.append(DepthwiseConv2dBackward._reference(grad_t, input, weight, ctx.geometry, ctx.needs))
        if input_t is not None:
            needs = (False, need_weight, False)
            parts.append(DepthwiseConv2dBackward._reference(grad, input_t, weight, ctx.geometry, needs))
        if weight_t is not None:
            needs = (need_input, False, False)
            parts.append(DepthwiseConv2dBackward._reference(grad, input, weight_t, ctx.geometry, needs))
        for part in parts:
            total = [t + p if p.numel() else t for t, p in zip(total, part, strict=True)]
        return tuple(t if need else grad.new_empty(0) for t, need in zip(total, ctx.needs, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        def one(grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            return DepthwiseConv2dBackward._reference(grad, input, weight, rest[:3], rest[3:6])

        return torch.vmap(one, in_dims)(*args), (0, 0, 0)
