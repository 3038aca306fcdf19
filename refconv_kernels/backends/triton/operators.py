"""The operators of the Triton backend, over its kernels; those are imported when they are first launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from refconv_kernels.backends.triton import torch_convolution


def _refocus_weight(basis: Tensor, refocus: Tensor, identity: bool) -> Tensor:
    from refconv_kernels.backends.triton import refocus as kernels

    return kernels.forward(basis, refocus, identity)


def _refocus_weight_backward(grad_transformed: Tensor, basis: Tensor, group_size: int, map_size: int) -> Tensor:
    from refconv_kernels.backends.triton import refocus as kernels

    return kernels.backward(grad_transformed, basis, group_size, map_size)


def _grouped_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    from refconv_kernels.backends.triton import depthwise as kernels

    return kernels.forward(input, weight, bias, stride, padding, dilation)


def _grouped_conv2d_backward(
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
    from refconv_kernels.backends.triton import depthwise as kernels

    return kernels.backward(grad_output, input, weight, stride, padding, dilation, need_input, need_weight, need_bias)


def _refconv2d(
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
    from refconv_kernels.backends.triton import fused
    from refconv_kernels.backends.triton import refocus as kernels

    geometry = stride, padding, dilation
    if own_convolution and fused.fuses(input, basis):
        return fused.forward(input, basis, refocus, bias, identity, *geometry)
    transformed = kernels.forward(basis, refocus, identity, input.dtype)
    if own_convolution:
        return _grouped_conv2d(input, transformed, bias, *geometry), transformed
    return torch_convolution.forward(input, transformed, basis, bias, *geometry), transformed


def _refconv2d_backward(
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
    from refconv_kernels.backends.triton import depthwise, fused

    geometry = stride, padding, dilation
    if own_convolution and need_refocus and fused.fuses(input, basis):
        dx, grad_weight, grad_refocus, grad_bias = fused.backward(
            grad_output, input, transformed, basis, group_size, map_size, *geometry, need_input, need_bias
        )
    else:
        run = depthwise.backward if own_convolution else torch_convolution.backward
        needs = need_input, need_basis or need_refocus, need_bias
        dx, grad_weight, grad_bias = run(grad_output, input, transformed, *geometry, *needs, basis)
        grad_refocus = basis.new_empty(0)
        if need_refocus:
            grad_refocus = _refocus_weight_backward(grad_weight, basis, group_size, map_size)
    return dx, grad_weight if need_basis else basis.new_empty(0), grad_refocus, grad_bias


def _thin_refocus_weight(basis: Tensor, coordinates: Tensor, factor: Tensor, identity: bool) -> Tensor:
    from refconv_kernels.backends.triton import thin

    return thin.forward(basis, coordinates, factor, identity)


def _thin_refocus_weight_backward(grad_transformed: Tensor, factor: Tensor) -> Tensor:
    from refconv_kernels.backends.triton import thin

    return thin.backward(grad_transformed, factor)


def _thin_refconv2d(
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
    from refconv_kernels.backends.triton import thin

    geometry = stride, padding, dilation
    if own_convolution:
        return thin.convolution_forward(input, basis, coordinates, factor, bias, identity, *geometry)
    transformed = thin.forward(basis, coordinates, factor, identity, input.dtype)
    return torch_convolution.forward(input, transformed, basis, bias, *geometry)


def _thin_refconv2d_backward(
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
    from refconv_kernels.backends.triton import thin

    geometry, weights = (stride, padding, dilation), (basis, coordinates, factor)
    if own_convolution:
        needs = need_input, need_weight, need_coordinates, need_bias
        return thin.convolution_backward(grad_output, input, *weights, identity, *geometry, *needs)
    transformed = thin.forward(*weights, identity, input.dtype)
    dx, grad_weight, grad_bias = torch_convolution.backward(
        grad_output, input, transformed, *geometry, need_input, need_weight or need_coordinates, need_bias, basis
    )
    grad_coordinates = thin.backward(grad_weight, factor) if need_coordinates else coordinates.new_empty(0)
    return dx, grad_weight if need_weight else basis.new_empty(0), grad_coordinates, grad_bias


def _folded_adam(*arguments: Any) -> tuple[Tensor, Tensor]:
    from refconv_kernels.backends.triton import folded_adam

    return folded_adam.folded_adam(*arguments)


#: Implementations of the operators ``refconv_triton::<name>`` (schemas: :mod:`refconv_kernels.ops`).
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "refocus_weight": _refocus_weight,
    "refocus_weight_backward": _refocus_weight_backward,
    "grouped_conv2d": _grouped_conv2d,
    "grouped_conv2d_backward": _grouped_conv2d_backward,
    "refconv2d": _refconv2d,
    "refconv2d_backward": _refconv2d_backward,
    "thin_refocus_weight": _thin_refocus_weight,
    "thin_refocus_weight_backward": _thin_refocus_weight_backward,
    "thin_refconv2d": _thin_refconv2d,
    "thin_refconv2d_backward": _thin_refconv2d_backward,
    "folded_adam": _folded_adam,
}
