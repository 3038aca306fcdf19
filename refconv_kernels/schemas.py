"""Operators: one schema and one fake kernel each, shared by all backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from refconv_kernels.geometry import output_format, output_size

#: Schema by name of the operator. What a backward does not compute comes back as an empty tensor.
SCHEMAS = {
    "refocus_weight": "(Tensor basis, Tensor refocus, bool identity) -> Tensor",
    "refocus_weight_backward": "(Tensor grad_transformed, Tensor basis, int group_size, int map_size) -> Tensor",
    "grouped_conv2d": (
        "(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation) -> Tensor"
    ),
    "grouped_conv2d_backward": (
        "(Tensor grad_output, Tensor input, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, "
        "bool need_input, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)"
    ),
    # Layers: W_t takes the type of the input; the convolution is the backend's or, not own_convolution, PyTorch's.
    "refconv2d": (  # the output and W_t
        "(Tensor input, Tensor basis, Tensor refocus, Tensor? bias, bool identity, int[2] stride, int[2] padding, "
        "int[2] dilation, bool own_convolution) -> (Tensor, Tensor)"
    ),
    "refconv2d_backward": (  # the gradients of the input, of W_t (if the basis wants it), of W_r and of the bias
        "(Tensor grad_output, Tensor input, Tensor transformed, Tensor basis, int group_size, int map_size, "
        "int[2] stride, int[2] padding, int[2] dilation, bool need_input, bool need_basis, bool need_refocus, "
        "bool need_bias, bool own_convolution) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "folded_adam": (  # the direction and the updated root
        "(Tensor first, Tensor root, Tensor gradient, Tensor rotation, float keep, float scale_first, "
        "float scale_second, float eps) -> (Tensor, Tensor)"
    ),
    "fused_sgd": (  # transformed is dW_t before and W_t after; momentum_buffer is empty if there is no momentum
        "(Tensor basis, Tensor(a!) transformed, Tensor(b!) refocus, Tensor(c!) momentum_buffer, bool identity, "
        "float lr, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool first) -> ()"
    ),
    "thin_refocus_weight": "(Tensor basis, Tensor coordinates, Tensor factor, bool identity) -> Tensor",
    "thin_refocus_weight_backward": "(Tensor grad_transformed, Tensor factor) -> Tensor",
    "thin_refconv2d": (
        "(Tensor input, Tensor basis, Tensor coordinates, Tensor factor, Tensor? bias, bool identity, int[2] stride, "
        "int[2] padding, int[2] dilation, bool own_convolution) -> Tensor"
    ),
    "thin_refconv2d_backward": (  # the gradients of the input, of W_t, of E and of the bias
        "(Tensor grad_output, Tensor input, Tensor basis, Tensor coordinates, Tensor factor, bool identity, "
        "int[2] stride, int[2] padding, int[2] dilation, bool need_input, bool need_weight, bool need_coordinates, "
        "bool need_bias, bool own_convolution) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
}


def _fake_refocus_weight(basis: Tensor, refocus: Tensor, identity: bool) -> Tensor:
    return basis.new_empty(basis.shape)


def _fake_refocus_weight_backward(grad_transformed: Tensor, basis: Tensor, group_size: int, map_size: int) -> Tensor:
    return basis.new_empty(basis.shape[0] * basis.shape[1], group_size, map_size, map_size)


def _fake_grouped_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    size = output_size(input, weight, stride, padding, dilation)
    output = input.new_empty(input.shape[0], weight.shape[0], *size)
    return output.to(memory_format=output_format(input, weight))


def _fake_grouped_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        input.new_empty(input.shape).to(memory_format=output_format(input, weight))
        if need_input
        else input.new_empty(0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


def _fake_refconv2d(
    input: Tensor,
    basis: Tensor,
    refocus: Tensor,
    bias: Tensor | None,
    identity: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    own_convolution: bool,
) -> tuple[Tensor, Tensor]:
    output = _fake_grouped_conv2d(input, basis, bias, stride, padding, dilation)
    return output, input.new_empty(basis.shape)


def _fake_refconv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    transformed: Tensor,
    basis: Tensor,
    group_size: int,
    map_size: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    need_input: bool,
    need_basis: bool,
    need_refocus: bool,
    need_bias: bool,
    own_convolution: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_input, grad_weight, grad_bias = _fake_grouped_conv2d_backward(
        grad_output, input, basis, stride, padding, dilation, need_input, need_basis, need_bias
    )
    grad_refocus = _fake_refocus_weight_backward(transformed, basis, group_size, map_size)
    return grad_input, grad_weight, grad_refocus if need_refocus else basis.new_empty(0), grad_bias


def _fake_thin_refocus_weight(basis: Tensor, coordinates: Tensor, factor: Tensor, identity: bool) -> Tensor:
    return basis.new_empty(basis.shape)


def _fake_thin_refocus_weight_backward(grad_transformed: Tensor, factor: Tensor) -> Tensor:
    return factor.new_empty(grad_transformed.shape[0] * grad_transformed.shape[1], factor.shape[1])


def _fake_thin_refconv2d(
    input: Tensor,
    basis: Tensor,
    coordinates: Tensor,
    factor: Tensor,
    bias: Tensor | None,
    identity: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    own_convolution: bool,
) -> Tensor:
    return _fake_grouped_conv2d(input, basis, bias, stride, padding, dilation)


def _fake_thin_refconv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    basis: Tensor,
    coordinates: Tensor,
    factor: Tensor,
    identity: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    need_input: bool,
    need_weight: bool,
    need_coordinates: bool,
    need_bias: bool,
    own_convolution: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_input, grad_weight, grad_bias = _fake_grouped_conv2d_backward(
        grad_output, input, basis, stride, padding, dilation, need_input, need_weight, need_bias
    )
    grad_coordinates = coordinates.new_empty(coordinates.shape if need_coordinates else 0)
    return grad_input, grad_weight, grad_coordinates, grad_bias


def _fake_folded_adam(
    first: Tensor,
    root: Tensor,
    gradient: Tensor,
    rotation: Tensor,
    keep: float,
    scale_first: float,
    scale_second: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return first.new_empty(first.shape), root.new_empty(root.shape)


def _fake_fused_sgd(*arguments: Any) -> None:
    """Nothing comes back."""


FAKES: dict[str, Callable[..., Any]] = {
    "refocus_weight": _fake_refocus_weight,
    "refocus_weight_backward": _fake_refocus_weight_backward,
    "grouped_conv2d": _fake_grouped_conv2d,
    "grouped_conv2d_backward": _fake_grouped_conv2d_backward,
    "refconv2d": _fake_refconv2d,
    "refconv2d_backward": _fake_refconv2d_backward,
    "folded_adam": _fake_folded_adam,
    "fused_sgd": _fake_fused_sgd,
    "thin_refocus_weight": _fake_thin_refocus_weight,
    "thin_refocus_weight_backward": _fake_thin_refocus_weight_backward,
    "thin_refconv2d": _fake_thin_refconv2d,
    "thin_refconv2d_backward": _fake_thin_refconv2d_backward,
}


def register(backend: str) -> None:
    """Define all operators of a backend."""
    for name, schema in SCHEMAS.items():
        torch.library.define(f"refconv_{backend}::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"refconv_{backend}::{name}", FAKES[name])
