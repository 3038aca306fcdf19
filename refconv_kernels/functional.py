"""RefConv without state: validated functions over tensors.

Everything here is differentiable to any order with respect to every tensor argument, follows autocast, and
runs on the backend that :func:`refconv_kernels.use_backend` or ``REFCONV_BACKEND`` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from refconv_kernels import reference, thin
from refconv_kernels.autocast import HALVES, autocast_dtype, cast, no_autocast
from refconv_kernels.autograd import GroupedConv2d, RefConv2d, RefocusWeight, ThinRefConv2d, ThinRefocusWeight, apply
from refconv_kernels.checks import (
    check_basis,
    check_dims,
    check_groups,
    check_padding,
    check_same,
    check_tensors,
    pair,
)
from refconv_kernels.geometry import is_channels_last, output_format, output_size
from refconv_kernels.ops import choose

__all__ = ["conv2d", "refconv2d", "refocus_factor", "refocus_weight", "thin_refconv2d", "thin_refocus_weight"]


def refocus_weight(basis: Tensor, refocus: Tensor, *, identity: bool = True) -> Tensor:
    """Transformed weights ``W_t = W_b * W_r + W_b`` (RefConv, Eq. 1), with the groups of Eq. 2.

    ``*`` is a stride-1 cross-correlation with zero padding ``k // 2`` over the 2-D kernels of the basis as
    channels. Each refocus group mixes ``g`` consecutive kernels in row-major ``(out, in)`` order.

    Equivalent to::

        N, g, k, _ = refocus.shape
        image = basis.reshape(1, N, *basis.shape[2:])
        moved = F.conv2d(image, refocus, padding=k // 2, groups=N // g)
        return basis + moved.reshape(basis.shape)

    Args:
        basis: basis weights ``W_b``, ``[C_out, C_in/g, K_h, K_w]``; any floating or complex dtype.
        refocus: refocusing weights ``W_r``, ``[N, g, k, k]`` with ``N = C_out * C_in/g`` and odd ``k``; dtype
            and device of ``basis``.
        identity: add ``W_b`` itself; False is the paper's "w/o shortcut".

    Returns:
        ``W_t`` in the shape, dtype and memory format of ``basis``. bfloat16 and float16 are computed in
        float32 and rounded once; autocast does not apply.

    Raises:
        TypeError: an argument is not a tensor, or the dtypes differ.
        ValueError: shapes or devices do not fit.

    Example:
        >>> basis = torch.randn(8, 1, 3, 3)                     # depthwise, 8 channels
        >>> refocus_weight(basis, torch.zeros(8, 8, 3, 3)).shape
        torch.Size([8, 1, 3, 3])
    """
    check_tensors(basis=basis, refocus=refocus)
    check_dims("basis", basis, 4, "[C_out, C_in/g, K_h, K_w]")
    check_dims("refocus", refocus, 4, "[N, g, k, k]")
    kernels, group_size, map_size, map_width = refocus.shape
    if map_size != map_width or map_size % 2 == 0:
        raise ValueError(f"refocus.shape[2:] (={(map_size, map_width)}) must be square and odd")
    if kernels != basis.shape[0] * basis.shape[1]:
        raise ValueError(
            f"refocus.shape[0] (={kernels}) must be the number of 2-D kernels in basis, "
            f"{basis.shape[0]} * {basis.shape[1]} = {basis.shape[0] * basis.shape[1]}"
        )
    if group_size == 0 or kernels % group_size != 0:
        raise ValueError(f"refocus.shape[0] (={kernels}) must be divisible by refocus.shape[1] (={group_size})")
    check_same("refocus", refocus, "basis", basis)

    dtype = basis.dtype
    with no_autocast(basis):
        if dtype in HALVES:
            basis, refocus = basis.float(), refocus.float()
        backend = choose("refocus_weight", basis, refocus)
        if backend == "reference":
            transformed = reference.refocus_weight(basis, refocus, identity)
        else:
            transformed = apply(RefocusWeight, basis, refocus, identity, backend)
        if transformed.dtype == dtype and basis.is_contiguous():
            return transformed
        return transformed.to(dtype, memory_format=output_format(basis))


def refocus_factor(basis: Tensor, groups: int, map_size: int = 3) -> Tensor:
    """The factor ``R`` of the thin form: ``W_b * W_r = E R`` with ``E = W_r Q`` and ``U = Q R`` (docs/numerics.md).

    ``U``, ``[g k^2, K_h K_w]`` per refocus group, is the basis unfolded, so that Eq. 1 is ``W_t = W_r U + W_b``. Where
    ``g k^2 > K_h K_w``, ``Q R`` is its polar decomposition: ``R`` is the symmetric square root of ``U^T U``, which is
    unique, and ``Q`` has orthonormal columns. Elsewhere ``Q`` is the identity and ``R`` is ``U`` itself.

    Args:
        basis: basis weights ``W_b``, ``[C_out, C_in/g, K_h, K_w]``, of any rank; float32, float64, bfloat16 or float16.
        groups: ``g``, the convolution's groups; divides the number of 2-D kernels.
        map_size: ``k``, odd.

    Returns:
        ``R``, ``[N/g, r, K_h K_w]`` with ``N = C_out * C_in/g`` and ``r = min(g k^2, K_h K_w)``; computed in float64,
        then in the dtype and on the device of ``basis``. Not differentiable.

    Raises:
        TypeError: ``basis`` is not a real floating-point tensor.
        ValueError: shapes do not fit.

    Example:
        >>> refocus_factor(torch.randn(8, 1, 3, 3), groups=8).shape
        torch.Size([1, 9, 9])
    """
    check_basis(basis, groups, map_size)
    return thin.factor(basis, groups, map_size)


def thin_refocus_weight(basis: Tensor, coordinates: Tensor, factor: Tensor, *, identity: bool = True) -> Tensor:
    """Transformed weights in the thin form, ``W_t = E R + W_b``: Eq. 1 in ``C_out C_in/g K_h K_w`` trained numbers.

    With ``R = refocus_factor(basis, groups)`` and ``E = W_r Q`` this is ``refocus_weight(basis, W_r)``, and SGD on
    ``E`` is SGD on ``W_r`` (docs/numerics.md). Not in the paper.

    Equivalent to::

        groups, rank, _ = factor.shape
        moved = coordinates.reshape(groups, -1, rank) @ factor
        return basis + moved.reshape(basis.shape)

    Args:
        basis: basis weights ``W_b``, ``[C_out, C_in/g, K_h, K_w]``; any floating or complex dtype.
        coordinates: ``E``, ``[N, r]`` with ``N = C_out * C_in/g``; dtype and device of ``basis``.
        factor: ``R``, ``[N/g, r, K_h K_w]``; dtype and device of ``basis``.
        identity: add ``W_b`` itself; False is the paper's "w/o shortcut".

    Returns:
        ``W_t`` in the shape, dtype and memory format of ``basis``. bfloat16 and float16 are computed in
        float32 and rounded once; autocast does not apply.

    Raises:
        TypeError: an argument is not a tensor, or the dtypes differ.
        ValueError: shapes or devices do not fit.

    Example:
        >>> basis = torch.randn(8, 1, 3, 3)
        >>> thin_refocus_weight(basis, torch.zeros(8, 9), refocus_factor(basis, groups=8)).shape
        torch.Size([8, 1, 3, 3])
    """
    check_tensors(basis=basis, coordinates=coordinates, factor=factor)
    check_dims("basis", basis, 4, "[C_out, C_in/g, K_h, K_w]")
    check_dims("coordinates", coordinates, 2, "[N, r]")
    check_dims("factor", factor, 3, "[N/g, r, K_h * K_w]")
    kernels, size = basis.shape[0] * basis.shape[1], basis.shape[2] * basis.shape[3]
    if coordinates.shape[0] != kernels:
        raise ValueError(
            f"coordinates.shape[0] (={coordinates.shape[0]}) must be the number of 2-D kernels in basis, "
            f"{basis.shape[0]} * {basis.shape[1]} = {kernels}"
        )
    if factor.shape[1:] != (coordinates.shape[1], size):
        raise ValueError(
            f"factor.shape[1:] (={tuple(factor.shape[1:])}) must be (r, K_h * K_w) = {(coordinates.shape[1], size)}"
        )
    if factor.shape[0] == 0 or kernels % factor.shape[0] != 0:
        raise ValueError(f"factor.shape[0] (={factor.shape[0]}) must divide the number of 2-D kernels (={kernels})")
    check_same("coordinates", coordinates, "basis", basis)
    check_same("factor", factor, "basis", basis)

    dtype = basis.dtype
    with no_autocast(basis):
        backend = choose("thin_refocus_weight", basis, coordinates, factor)
        if backend == "reference":
            if dtype in HALVES:
                basis, coordinates, factor = basis.float(), coordinates.float(), factor.float()
            transformed = reference.thin_refocus_weight(basis, coordinates, factor, identity)
        else:
            transformed = apply(ThinRefocusWeight, basis, coordinates, factor, identity, backend)
        if transformed.dtype == dtype and basis.is_contiguous():
            return transformed
        return transformed.to(dtype, memory_format=output_format(basis))


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
) -> Tensor:
    """The feature-map convolution, with this library's kernels where they cover the problem.

    Equivalent to :func:`torch.nn.functional.conv2d`, plus ``padding_mode`` as in :class:`torch.nn.Conv2d`.

    Args:
        input: ``[B, C_in, H, W]`` or unbatched ``[C_in, H, W]``; ``B`` may be 0; any memory format.
        weight: ``[C_out, C_in/groups, K_h, K_w]``, dtype and device of ``input`` (under autocast, both are cast).
        bias: ``[C_out]`` or None.
        stride, dilation: pixels, one number or ``(height, width)``.
        padding: pixels on each side, one number or ``(height, width)``, or ``"same"`` or ``"valid"``.
        groups: divides both ``C_in`` and ``C_out``.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.

    Returns:
        ``[B, C_out, H_out, W_out]`` or unbatched, in the memory format that PyTorch's convolution gives.

    Raises:
        TypeError: an argument is not a tensor, or the dtypes differ.
        ValueError: shapes, devices or options do not fit.

    Example:
        >>> conv2d(torch.randn(2, 8, 5, 5), torch.randn(8, 1, 3, 3), padding=1, groups=8).shape
        torch.Size([2, 8, 5, 5])
    """
    check_tensors(input=input, weight=weight)
    check_dims("weight", weight, 4, "[C_out, C_in/groups, K_h, K_w]")
    if input.dim() not in (3, 4):
        raise ValueError(f"input.shape (={tuple(input.shape)}) must be [B, C_in, H, W] or [C_in, H, W]")
    stride, dilation = pair("stride", stride, 1), pair("dilation", dilation, 1)
    check_groups(groups)
    if weight.shape[0] % groups != 0:
        raise ValueError(f"weight.shape[0] (={weight.shape[0]}) must be divisible by groups (={groups})")
    if input.shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"input has {input.shape[-3]} channels (input.shape={tuple(input.shape)}), but in_channels must be "
            f"weight.shape[1] * groups = {weight.shape[1] * groups}"
        )
    if bias is not None:
        check_tensors(bias=bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias.shape (={tuple(bias.shape)}) must be (C_out,) = ({weight.shape[0]},)")

    dtype = autocast_dtype(input.device.type)
    if dtype is not None:
        input, weight = cast(input, dtype), cast(weight, dtype)
        bias = None if bias is None else cast(bias, dtype)
    check_same("input", input, "weight", weight)
    if bias is not None:
        check_same("bias", bias, "weight", weight)

    before, after = _pads(padding, padding_mode, stride, dilation, weight.shape[2:])
    if padding_mode != "zeros":
        input = _pad(input, before, after, padding_mode)
        before = after = (0, 0)
    elif before != after:  # "same" with an even span: the extra row or column goes to the end, as in PyTorch
        input = _pad(input, (0, 0), (after[0] - before[0], after[1] - before[1]), "constant")
    for d, name in enumerate(("height", "width")):
        size, span = input.shape[d - 2] + 2 * before[d], dilation[d] * (weight.shape[d + 2] - 1) + 1
        if size < span:
            raise ValueError(
                f"input {name} (={input.shape[d - 2]}, {size} with padding) must be at least the {name} of the "
                f"dilated kernel (={span})"
            )

    # A convolution without groups is PyTorch's own on every backend, one with many channels per group may be.
    if groups > 1 or weight.shape[1] == 1:
        problem = (input, weight, groups, output_size(input, weight, stride, before, dilation)[1])
        backend = choose("grouped_conv2d", *problem, optional=weight.shape[1] > 1)
        if backend != "reference":
            batched = input.unsqueeze(0) if input.dim() == 3 else input
            output = apply(GroupedConv2d, batched, weight, bias, stride, before, dilation, backend)
            return output.squeeze(0) if input.dim() == 3 else output
    return reference.conv2d(input, weight, bias, stride, before, dilation, groups)


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
    check_tensors(refocus=refocus)
    if refocus.dim() == 4 and refocus.shape[1] != groups:
        raise ValueError(f"refocus.shape[1] (={refocus.shape[1]}) must be groups (={groups}), Eq. 2 of the paper")
    geometry = stride, padding, dilation
    backend = _one_call("refconv2d", input, basis, (refocus,), bias, *geometry, groups, padding_mode)
    if backend != "reference":
        return apply(RefConv2d, input, basis, refocus, bias, identity, *geometry, backend)[0]
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
    check_tensors(basis=basis, factor=factor)
    kernels = basis.shape[0] * basis.shape[1] if basis.dim() == 4 else 0
    if kernels and factor.dim() == 3 and factor.shape[0] * groups != kernels:
        raise ValueError(
            f"factor.shape[0] (={factor.shape[0]}) must be the number of 2-D kernels / groups, {kernels} / {groups}"
        )
    geometry = stride, padding, dilation
    backend = _one_call("thin_refconv2d", input, basis, (coordinates, factor), bias, *geometry, groups, padding_mode)
    if backend != "reference":
        return apply(ThinRefConv2d, input, basis, coordinates, factor, bias, identity, *geometry, backend)
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
    given = (input, basis, *weights) if bias is None else (input, basis, *weights, bias)
    if not all(isinstance(t, Tensor) for t in given) or torch._C._are_functorch_transforms_active():
        return "reference"
    pairs = (stride, padding, dilation)
    if padding_mode != "zeros" or not all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
        return "reference"
    if not all(isinstance(v, int) for p in pairs for v in p):
        return "reference"
    if any(t.dtype != input.dtype or t.device != input.device for t in given):
        return "reference"
    if input.dim() != 4 or basis.dim() != 4 or autocast_dtype(input.device.type) is not None:
        return "reference"
    out_channels, per_group, *size = basis.shape
    kernels = out_channels * per_group
    if input.shape[1] != per_group * groups or out_channels % groups != 0:
        return "reference"
    if len(weights) == 1:
        map_size = weights[0].shape[-1]
        fits = weights[0].shape == (kernels, groups, map_size, map_size) and map_size % 2 == 1
    else:
        rank = weights[0].shape[-1]
        fits = weights[0].shape == (kernels, rank) and weights[1].shape == (kernels // groups, rank, size[0] * size[1])
    if not fits or (bias is not None and bias.shape != (out_channels,)):
        return "reference"
    if is_channels_last(basis):  # decides about the output's, and the operator's W_t has none
        return "reference"
    if min(*stride, *dilation) < 1 or min(padding) < 0:
        return "reference"
    out_size = output_size(input, basis, stride, padding, dilation)
    if min(out_size) < 1:
        return "reference"
    return choose(operator, input, basis, *weights, groups, out_size[1], optional=True)


def _pads(
    padding: int | Sequence[int] | str,
    padding_mode: str,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    kernel_size: Sequence[int],
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Pixels of padding before and after, each ``(height, width)``."""
    check_padding(padding, padding_mode, stride)
    if padding == "valid":
        return (0, 0), (0, 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        before = (total[0] // 2, total[1] // 2)
        return before, (total[0] - before[0], total[1] - before[1])
    both = pair("padding", padding, 0)  # type: ignore[arg-type]
    return both, both


def _pad(input: Tensor, before: tuple[int, int], after: tuple[int, int], mode: str) -> Tensor:
    return torch.nn.functional.pad(input, (before[1], after[1], before[0], after[0]), mode=mode)
