"""PyTorch's own convolution, for the layers whose convolution no kernel here covers."""

from __future__ import annotations

import torch
from torch import Tensor

from refconv_kernels.geometry import output_format


def forward(
    input: Tensor,
    transformed: Tensor,
    basis: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """``y`` from ``W_t`` in the type of ``input``, in the layout that ``input`` and ``basis`` ask for."""
    layout, groups = output_format(input, basis), input.shape[1] // basis.shape[1]
    bias = None if bias is None else bias.to(input.dtype)
    input = input.contiguous(memory_format=layout)
    y = torch.nn.functional.conv2d(input, transformed, bias, stride, padding, dilation, groups)
    return y.contiguous(memory_format=layout)


def backward(
    grad_output: Tensor,
    input: Tensor,
    transformed: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    basis: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx, dW_t, dbias)``, empty where not needed; the last two in the type of ``basis``."""
    layout, groups = output_format(input, basis), input.shape[1] // basis.shape[1]
    dx, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_output, input.contiguous(memory_format=layout), transformed, [basis.shape[0]],
        stride, padding, dilation, False, [0, 0], groups, [need_input, need_weight, need_bias],
    )  # fmt: skip
    return (
        dx.contiguous(memory_format=layout) if need_input else input.new_empty(0),
        grad_weight.to(basis.dtype).contiguous() if need_weight else basis.new_empty(0),
        grad_bias.to(basis.dtype) if need_bias else basis.new_empty(0),
    )
