"""The feature-map convolution, grouped or depthwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from refconv_kernels import reference
from refconv_kernels.autograd.calls import derive
from refconv_kernels.geometry import Pair
from refconv_kernels.ops import KERNELS


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
        grads = derive(GroupedConv2dBackward, grad, input, weight, *ctx.geometry, *needs, ctx.backend)
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
