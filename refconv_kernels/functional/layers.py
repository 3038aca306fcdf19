"""A layer, both steps: in one operator where a backend has one, otherwise one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from refconv_kernels.autocast import autocast_dtype, cast
from refconv_kernels.autograd import RefConv2d, ThinRefConv2d, apply, native
from refconv_kernels.checks import check_tensors, pair
from refconv_kernels.functional.convolution import conv2d, pads
from refconv_kernels.functional.weights import refocus_weight, thin_refocus_weight
from refconv_kernels.geometry import output_size
from refconv_kernels.ops import choose, recall, remember

_TWO_STEPS = "reference", False  # one by one


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
    call = native.REFCONV2D, (input, basis, refocus, bias), identity, *geometry, groups, padding_mode
    output = native.call(*call)
    if output is not None:
        return output
    plain = _in_pairs(*geometry, basis)
    input = _autocast(input)
    backend, own = _one_call("refconv2d", input, basis, (refocus,), bias, *plain, groups, padding_mode)
    if backend != "reference":
        native.remember(backend, own, *call)
        return apply(RefConv2d, input, basis, refocus, bias, identity, *plain, own, backend)[0]
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
    call = native.THIN_REFCONV2D, (input, basis, coordinates, factor, bias), identity, *geometry, groups, padding_mode
    output = native.call(*call)
    if output is not None:
        return output
    plain = _in_pairs(*geometry, basis)
    input = _autocast(input)
    backend, own = _one_call("thin_refconv2d", input, basis, (coordinates, factor), bias, *plain, groups, padding_mode)
    if backend != "reference":
        native.remember(backend, own, *call)
        return apply(ThinRefConv2d, input, basis, coordinates, factor, bias, identity, *plain, own, backend)
    check_tensors(basis=basis, factor=factor)
    kernels = basis.shape[0] * basis.shape[1] if basis.dim() == 4 else 0
    if kernels and factor.dim() == 3 and factor.shape[0] * groups != kernels:
        raise ValueError(
            f"factor.shape[0] (={factor.shape[0]}) must be the number of 2-D kernels / groups, {kernels} / {groups}"
        )
    weight = thin_refocus_weight(basis, coordinates, factor, identity=identity)
    return conv2d(input, weight, bias, *geometry, groups, padding_mode=padding_mode)


def _in_pairs(stride: Any, padding: Any, dilation: Any, basis: Any) -> tuple[Any, Any, Any]:
    """Numbers and names as pairs; what is wrong, or pads one side more, as it is: the two steps deal with it."""
    try:
        pairs = pair("stride", stride, 1), pair("dilation", dilation, 1)
        before, after = pads(padding, "zeros", *pairs, basis.shape[2:])
    except (AttributeError, TypeError, ValueError):
        return stride, padding, dilation
    return (pairs[0], before, pairs[1]) if before == after else (stride, padding, dilation)


def _autocast(input: Tensor) -> Tensor:
    """``input`` in the type that autocast gives the convolution."""
    dtype = autocast_dtype(input.device.type) if isinstance(input, Tensor) else None
    return input if dtype is None else cast(input, dtype)


def _one_call(*arguments: Any) -> tuple[str, bool]:
    """What :func:`_decide` answers, looked up where it was asked about such arguments before."""
    operator, input, basis, weights, bias, *geometry = arguments
    try:
        problem: Any = (
            *(f"{operator} {geometry!r}", input.shape, input.stride(), input.dtype, input.device),  # 1.0 is not 1
            *(basis.shape, basis.stride(), basis.dtype, basis.device),
            *((t.shape, t.dtype, t.device) for t in (*weights, bias) if t is not None),
        )
        known = recall(problem) if input.dtype is basis.dtype else None  # otherwise it depends on autocast
    except (AttributeError, TypeError):  # no tensors, lists, symbolic sizes
        problem = known = None
    if known is not None and not torch._C._are_functorch_transforms_active():
        return known
    decided = _decide(*arguments)
    if problem is not None and decided is not _TWO_STEPS and input.dtype is basis.dtype:
        remember(problem, decided)
    return decided


def _decide(
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
) -> tuple[str, bool]:
    """The backend that runs both steps as one operator, and whether the convolution is its own or PyTorch's;
    ``_TWO_STEPS`` when they are taken one by one.

    For the plain case only, and only for arguments beyond doubt: the two steps know the rest and the errors.
    ``weights`` are what the transformation is made of: ``(W_r,)`` or ``(E, R)``.
    """
    # Plain loops: a layer pays for every microsecond of this twice per step.
    if not (isinstance(input, Tensor) and isinstance(basis, Tensor)) or padding_mode != "zeros":
        return _TWO_STEPS
    if torch._C._are_functorch_transforms_active():
        return _TWO_STEPS
    dtype, device = basis.dtype, basis.device
    for given in weights if bias is None else (*weights, bias):
        if not isinstance(given, Tensor) or given.dtype != dtype or given.device != device:
            return _TWO_STEPS
    if input.device != device or input.dim() != 4 or basis.dim() != 4:
        return _TWO_STEPS
    if input.dtype != dtype and (dtype is not torch.float32 or autocast_dtype(device.type) is not input.dtype):
        return _TWO_STEPS
    for both in (stride, padding, dilation):
        if not isinstance(both, tuple) or len(both) != 2:
            return _TWO_STEPS
        if not (isinstance(both[0], int) and isinstance(both[1], int)):
            return _TWO_STEPS
    out_channels, per_group, *size = basis.shape
    kernels = out_channels * per_group
    if kernels == 0 or input.shape[1] != per_group * groups or out_channels % groups != 0:
        return _TWO_STEPS
    shape = weights[0].shape  # of W_r or E
    if len(weights) == 1:
        fits = len(shape) == 4 and shape == (kernels, groups, shape[2], shape[2]) and shape[2] % 2 == 1
    else:
        fits = len(shape) == 2 and shape[0] == kernels
        fits = fits and weights[1].shape == (kernels // groups, shape[1], size[0] * size[1])
    if not fits or (bias is not None and bias.shape != (out_channels,)):
        return _TWO_STEPS
    if min(*stride, *dilation) < 1 or min(padding) < 0:
        return _TWO_STEPS
    if min(output_size(input, basis, stride, padding, dilation)) < 1:
        return _TWO_STEPS
    geometry = stride, padding, dilation
    backend = choose(operator, input, basis, *weights, groups, geometry, optional=True)
    if backend == "reference":
        return _TWO_STEPS
    # A convolution without groups is PyTorch's own on every backend, one with many channels per group may be.
    own = (groups > 1 or per_group == 1) and backend == choose(
        "grouped_conv2d", input, basis, groups, geometry, optional=True
    )
    if not own and torch.compiler.is_compiling():  # the compiler has plans of its own for PyTorch's convolutions
        return _TWO_STEPS
    return backend, own
