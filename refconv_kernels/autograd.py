"""Autograd Functions over the raw forward and backward operators.

Each operator is bilinear in its tensors, so the backward of a backward is again the same operator with
other arguments; those second derivatives take the reference path, which PyTorch differentiates to any
order. A backward that nobody differentiates calls its operator directly. ``setup_context`` and ``vmap`` make
the Functions work under ``torch.func``. There is no ``jvp``, because ``torch.compile`` refuses Functions that
have one: :func:`refconv_kernels.ops.choose` sends forward-mode differentiation to the reference path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from refconv_kernels import reference
from refconv_kernels.ops import KERNELS

Pair = tuple[int, int]


def apply(function: type[Function], *args: Any) -> Any:
    """``function.apply(*args)`` without what that does at every call for default arguments: 50 microseconds."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]


def _derive(function: type[Function], *args: Any) -> Any:
    """What a backward computes with ``function``, recorded only if somebody asked for second derivatives."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return apply(function, *args)
    return function.forward(*args)


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
            grad_basis, _ = reference.refocus_weight_backward(grad, basis, refocus, ctx.identity, True, False)
        if ctx.needs_input_grad[1]:
            _, group_size, map_size, _ = refocus.shape
            grad_refocus = _derive(RefocusWeightBackward, grad, basis, group_size, map_size, ctx.backend)
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
            grad_basis, _ = reference.refocus_weight_backward(grad, basis, grad_grad_refocus, False, True, False)
        return grad_grad, grad_basis, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        def one(grad: Tensor, basis: Tensor, group_size: int, map_size: int, _: str) -> Any:
            refocus = basis.new_zeros(basis.shape[0] * basis.shape[1], group_size, map_size, map_size)
            return reference.refocus_weight_backward(grad, basis, refocus, False, False, True)[1]

        return torch.vmap(one, in_dims)(*args), 0


class GroupedConv2d(Function):
    """``y`` from ``(x, W, bias)``, grouped, batched."""

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, dilation: Pair, backend: str
    ) -> Tensor:
        return KERNELS["grouped_conv2d"][backend].forward(input, weight, bias, stride, padding, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, *ctx.geometry, ctx.backend = inputs
        ctx.save_for_backward(input, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grads = _derive(GroupedConv2dBackward, grad, input, weight, *ctx.geometry, *needs, ctx.backend)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        def one(input: Tensor, weight: Tensor, bias: Tensor | None, s: Pair, p: Pair, d: Pair, _: str) -> Tensor:
            return reference.conv2d(input, weight, bias, s, p, d, input.shape[1] // weight.shape[1])

        return torch.vmap(one, in_dims)(*args), 0


class GroupedConv2dBackward(Function):
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
        run = KERNELS["grouped_conv2d"][backend].backward
        return run(grad, input, weight, stride, padding, dilation, need_input, need_weight, need_bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad, input, weight, *rest = inputs
        ctx.geometry = tuple(rest[:3])
        ctx.save_for_backward(grad, input, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_dx: Tensor | None, grad_dw: Tensor | None, grad_db: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # dx is bilinear in (dy, W), dW in (dy, x), dbias linear in dy.
        grad, input, weight = ctx.saved_tensors
        geometry: tuple[Pair, Pair, Pair] = ctx.geometry
        groups = input.shape[1] // weight.shape[1]
        grad_grad = grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            terms = []
            if grad_dx is not None:
                terms.append(reference.conv2d(grad_dx, weight, None, *geometry, groups))
            if grad_dw is not None:
                terms.append(reference.conv2d(input, grad_dw, None, *geometry, groups))
            if grad_db is not None:
                terms.append(grad_db[:, None, None].expand_as(grad))
            grad_grad = sum(terms[1:], terms[0]) if terms else None
        if ctx.needs_input_grad[1] and grad_dw is not None:
            needs = (True, False, False)
            grad_input = reference.conv2d_backward(grad, input, grad_dw, *geometry, groups, needs)[0]
        if ctx.needs_input_grad[2] and grad_dx is not None:
            needs = (False, True, False)
            grad_weight = reference.conv2d_backward(grad, grad_dx, weight, *geometry, groups, needs)[1]
        return grad_grad, grad_input, grad_weight, *(None,) * 7

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        def one(grad: Tensor, input: Tensor, weight: Tensor, s: Pair, p: Pair, d: Pair, *rest: Any) -> Any:
            groups = input.shape[1] // weight.shape[1]
            grads = reference.conv2d_backward(grad, input, weight, s, p, d, groups, rest[:3])
            return tuple(g if g is not None else grad.new_empty(0) for g in grads)

        return torch.vmap(one, in_dims)(*args), (0, 0, 0)


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
            needs_basis = (True, False)
            grad_basis = reference.refocus_weight_backward(grad_weight, basis, refocus, ctx.identity, *needs_basis)[0]
        grads = (grad_input, grad_basis, grad_refocus, grad_bias)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 5
