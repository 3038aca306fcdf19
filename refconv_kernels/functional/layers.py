"""A layer, both steps: in one operator where a backend has one, otherwise one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from refconv_kernels.autocast import autocast_dtype
from refconv_kernels.autograd import RefConv2d, ThinRefConv2d, apply
from refconv_kernels.checks import check_tensors
from refconv_kernels.functional.convolution import conv2d
from refconv_kernels.functional.weights import refocus_weight, thin_refocus_weight
from refconv_kernels.geometry import is_channels_last, output_size
from refconv_kernels.ops import choose


def refconv2d(
    input: Tensor,
    basis: Tensor,
    refocus: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    identity: bool = True,
) -> Tensor:
    """Refocusing convolution ``y = conv2d(x, W_b * W_r + W_b)`` (RefConv, Eq. 1).

    Equivalent to ``conv2d(input, refocus_weight(basis, refocus, identity=identity), bias, ...)``; see
    :func:`refocus_weight` and :func:`conv2d` for shapes, dtypes and errors. ``refocus.shape[1]`` must be
    ``groups`` (Eq. 2).

    Example:
        >>> x, basis, refocus = torch.randn(2, 8, 5, 5), torch.randn(8, 1, 3, 3), torch.randn(8, 8, 3, 3)
        >>> refconv2d(x, basis, refocus, padding=1, groups=8).shape
        torch.Size([2, 8, 5, 5])
    """
    geometry = stride, padding, dilation
    backend = _one_call("refconv2d", input, basis, (refocus,), bias, *geometry, groups, padding_mode)
    if backend != "reference":
        return apply(RefConv2d, input, basis, refocus, bias, identity, *geometry, backend)[0]
    check_tensors(refocus=refocus)
    if refocus.dim() == 4 and refocus.shape[1] != groups:
        raise ValueError(f"refocus.shape[1] (={refocus.shape[1]}) must be groups (={groups}), Eq. 2 of the paper")
    weight = refocus_weight(basis, refocus, identity=identity)
    return conv2d(input, weight, bias, *geometry, groups, padding_mode=padding_mode)


def thin_refconv2d(
    input: Tensor,
    basis: Tensor,
    coordinates: Tensor,
    factor: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    identity: bool = True,
) -> Tensor:
    """Refocusing convolution in the thin form, ``y = conv2d(x, E R + W_b)``.

    Equivalent to ``conv2d(input, thin_refocus_weight(basis, coordinates, factor, identity=identity), bias, ...)``; see
    :func:`thin_refocus_weight` and :func:`conv2d` for shapes, dtypes and errors. ``factor.shape[0]`` must be
    ``N / groups`` (Eq. 2).

    Example:
        >>> x, basis, coordinates = torch.randn(2, 8, 5, 5), torch.randn(8, 1, 3, 3), torch.randn(8, 9)
        >>> thin_refconv2d(x, basis, coordinates, refocus_factor(basis, 8), padding=1, groups=8).shape
        torch.Size([2, 8, 5, 5])
    """
    geometry = stride, padding, dilation
    backend = _one_call("thin_refconv2d", input, basis, (coordinates, factor), bias, *geometry, groups, padding_mode)
    if backend != "reference":
        return apply(ThinRefConv2d, input, basis, coordinates, factor, bias, identity, *geometry, backend)
    check_tensors(basis=basis, factor=factor)
    kernels = basis.shape[0] * basis.shape[1] if basis.dim() == 4 else 0
    if kernels and factor.dim() == 3 and factor.shape[0] * groups != kernels:
        raise ValueError(
            f"factor.shape[0] (={factor.shape[0]}) must be the number of 2-D kernels / groups, {kernels} / {groups}"
        )
    weight = thin_refocus_weight(basis, coordinates, factor, identity=identity)
    return conv2d(input, weight, bias, *geometry, groups, padding_mode=padding_mode)


def _one_call(
    operator: str,
    input: Tensor,
    basis: Tensor,
    weights: tuple[Tensor, ...],
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: str,
) -> str:
    """The backend that runs both steps as one operator; ``"reference"`` when they are taken one by one.

    For the plain case only, and only for arguments beyond doubt: the two steps know the rest and the errors.
    ``weights`` are what the transformation is made of: ``(W_r,)`` or ``(E, R)``.
    """
    # Plain loops: a layer pays for every microsecond of this twice per step.
    if not isinstance(input, Tensor) or torch._C._are_functorch_transforms_active() or padding_mode != "zeros":
        return "reference"
    for given in (basis, *weights) if bias is None else (basis, *weights, bias):
        if not isinstance(given, Tensor) or given.dtype != input.dtype or given.device != input.device:
            return "reference"
    for pair in (stride, padding, dilation):
        if not isinstance(pair, tuple) or len(pair) != 2:
            return "reference"
        if not (isinstance(pair[0], int) and isinstance(pair[1], int)):
            return "reference"
    if input.dim() != 4 or basis.dim() != 4 or autocast_dtype(input.device.type) is not None:
        return "reference"
    out_channels, per_group, *size = basis.shape
    kernels = out_channels * per_group
    if input.shape[1] != per_group * groups or out_channels % groups != 0:
        return "reference"
    shape = weights[0].shape  # of W_r or E
    if len(weights) == 1:
        fits = len(shape) == 4 and shape == (kernels, groups, shape[2], shape[2]) and shape[2] % 2 == 1
    else:
        fits = len(shape) == 2 and shape[0] == kernels
        fits = fits and weights[1].shape == (kernels // groups, shape[1], size[0] * size[1])
    if not fits or (bias is not None and bias.shape != (out_channels,)):
        return "reference"
    if is_channels_last(basis):  # decides about the output's, and the operator's W_t has none
        return "reference"
    if min(*stride, *dilation) < 1 or min(padding) < 0:
        return "reference"
    if min(output_size(input, basis, stride, padding, dilation)) < 1:
        return "reference"
    return choose(operator, input, basis, *weights, groups, (stride, padding, dilation), optional=True)
