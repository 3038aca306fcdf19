"""RefConv without state: validated functions over tensors.

Everything here is differentiable to any order with respect to every tensor argument, follows autocast, and
runs on the backend that :func:`refconv_kernels.use_backend` or ``REFCONV_BACKEND`` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from refconv_kernels import reference
from refconv_kernels.autograd import GroupedConv2d, RefConv2d, RefocusWeight, apply
from refconv_kernels.geometry import is_channels_last, output_format, output_size
from refconv_kernels.ops import choose

__all__ = ["conv2d", "refconv2d", "refocus_weight"]

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_HALVES = (torch.bfloat16, torch.float16)


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
    _check_tensors(basis=basis, refocus=refocus)
    _check_dims("basis", basis, 4, "[C_out, C_in/g, K_h, K_w]")
    _check_dims("refocus", refocus, 4, "[N, g, k, k]")
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
    _check_same("refocus", refocus, "basis", basis)

    dtype = basis.dtype
    with no_autocast(basis):
        if dtype in _HALVES:
            basis, refocus = basis.float(), refocus.float()
        backend = choose("refocus_weight", basis, refocus)
        if backend == "reference":
            transformed = reference.refocus_weight(basis, refocus, identity)
        else:
            transformed = apply(RefocusWeight, basis, refocus, identity, backend)
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
    _check_tensors(input=input, weight=weight)
    _check_dims("weight", weight, 4, "[C_out, C_in/groups, K_h, K_w]")
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
        _check_tensors(bias=bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias.shape (={tuple(bias.shape)}) must be (C_out,) = ({weight.shape[0]},)")

    dtype = _autocast_dtype(input.device.type)
    if dtype is not None:
        input, weight = _cast(input, dtype), _cast(weight, dtype)
        bias = None if bias is None else _cast(bias, dtype)
    _check_same("input", input, "weight", weight)
    if bias is not None:
        _check_same("bias", bias, "weight", weight)

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
    _check_tensors(refocus=refocus)
    if refocus.dim() == 4 and refocus.shape[1] != groups:
        raise ValueError(f"refocus.shape[1] (={refocus.shape[1]}) must be groups (={groups}), Eq. 2 of the paper")
    backend = _one_call(input, basis, refocus, bias, stride, padding, dilation, groups, padding_mode)
    if backend != "reference":
        return apply(RefConv2d, input, basis, refocus, bias, identity, stride, padding, dilation, backend)[0]
    weight = refocus_weight(basis, refocus, identity=identity)
    return conv2d(input, weight, bias, stride, padding, dilation, groups, padding_mode=padding_mode)


def _one_call(
    input: Tensor,
    basis: Tensor,
    refocus: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    padding_mode: str,
) -> str:
    """The backend that runs both steps as one operator; ``"reference"`` when they are taken one by one.

    For the plain case only, and only for arguments beyond doubt: the two steps know the rest and the errors.
    """
    tensors = [t for t in (input, basis, refocus, bias) if isinstance(t, Tensor)]
    if len(tensors) != (3 if bias is None else 4) or torch._C._are_functorch_transforms_active():
        return "reference"
    pairs = (stride, padding, dilation)
    if padding_mode != "zeros" or not all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
        return "reference"
    if not all(isinstance(v, int) for p in pairs for v in p):
        return "reference"
    if any(t.dtype != input.dtype or t.device != input.device for t in tensors):
        return "reference"
    if input.dim() != 4 or basis.dim() != 4 or _autocast_dtype(input.device.type) is not None:
        return "reference"
    out_channels, per_group, map_size = *basis.shape[:2], refocus.shape[-1]
    if input.shape[1] != per_group * groups or out_channels % groups != 0 or map_size % 2 == 0:
        return "reference"
    if refocus.shape != (out_channels * per_group, groups, map_size, map_size):
        return "reference"
    if bias is not None and bias.shape != (out_channels,):
        return "reference"
    if is_channels_last(basis):  # decides about the output's, and the operator's W_t has none
        return "reference"
    if min(*stride, *dilation) < 1 or min(padding) < 0:
        return "reference"
    size = output_size(input, basis, stride, padding, dilation)
    if min(size) < 1:
        return "reference"
    return choose("refconv2d", input, basis, refocus, groups, size[1], optional=True)


# --- autocast, shared with the module -----------------------------------------------------------------------


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast leaves operations on the device of ``tensor`` alone."""
    device = tensor.device.type
    return nullcontext() if _autocast_dtype(device) is None else torch.autocast(device, enabled=False)


def _autocast_dtype(device: str) -> torch.dtype | None:
    """The type that autocast wants for a convolution on ``device``; None where it is off."""
    # Not torch.amp.is_autocast_available(), which the compiler of torch 2.11 cannot trace; meta has no autocast.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.dtype in (torch.float32, *_HALVES) else tensor  # as autocast does


# --- validation, shared with the module ---------------------------------------------------------------------


def pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """``value`` as ``(height, width)``; each at least ``least``."""
    try:
        both = (value, value) if isinstance(value, int) else tuple(value)
    except TypeError:
        both = ()
    if len(both) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in both):
        raise ValueError(f"{name} (={value!r}) must be an int of at least {least}, or two of them")
    return both


def check_groups(groups: int) -> None:
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise ValueError(f"groups (={groups!r}) must be a positive int")


def check_padding(padding: int | Sequence[int] | str, padding_mode: str, stride: tuple[int, int]) -> None:
    """Raise unless ``padding`` and ``padding_mode`` are what :class:`torch.nn.Conv2d` accepts."""
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode (={padding_mode!r}) must be one of {PADDING_MODES}")
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding (={padding!r}) must be 'same', 'valid', an int, or two of them")
        if padding == "same" and stride != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, got stride (={stride})")
    else:
        pair("padding", padding, 0)


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


def _check_tensors(**tensors: object) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} (={value!r}) must be a torch.Tensor")
        if not (value.is_floating_point() or value.is_complex()):
            raise TypeError(f"{name}.dtype (={value.dtype}) must be a floating-point or complex type")


def _check_dims(name: str, tensor: Tensor, dims: int, shape: str) -> None:
    if tensor.dim() != dims:
        raise ValueError(f"{name}.shape (={tuple(tensor.shape)}) must be {shape}")


def _check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name}.dtype (={tensor.dtype}) must be the dtype of {other_name} (={other.dtype})")
    if tensor.device != other.device:
        raise ValueError(f"{name}.device (={tensor.device}) must be the device of {other_name} (={other.device})")
