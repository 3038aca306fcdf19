"""The feature-map convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from refconv_kernels import reference
from refconv_kernels.autocast import autocast_dtype, cast
from refconv_kernels.autograd import GroupedConv2d, apply, native
from refconv_kernels.checks import check_dims, check_groups, check_padding, check_same, check_tensors, pair
from refconv_kernels.ops import choose, recall, remember


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
    call = native.GROUPED_CONV2D, (input, weight, bias), True, stride, padding, dilation, groups, padding_mode
    output = native.call(*call)
    if output is not None:
        return output
    try:
        problem: Any = (
            f"conv2d {stride!r} {padding!r} {dilation!r} {groups!r} {padding_mode!r}",  # 1.0 is not 1
            *(input.shape, input.stride(), input.dtype, input.device),
            *(weight.shape, weight.stride(), weight.dtype, weight.device),
            None if bias is None else (bias.shape, bias.dtype, bias.device),
        )
        known = recall(problem) if autocast_dtype(input.device.type) is None else None
    except (AttributeError, TypeError):  # no tensors, symbolic sizes
        problem = known = None
    if known is not None:
        native.remember(known[-1], True, *call)
        return apply(GroupedConv2d, input, weight, bias, *known)

    check_tensors(input=input, weight=weight)
    check_dims("weight", weight, 4, "[C_out, C_in/groups, K_h, K_w]")
    if weight.numel() == 0:
        raise ValueError(f"weight.shape (={tuple(weight.shape)}) must have sizes of at least 1")
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

    before, after = pads(padding, padding_mode, stride, dilation, weight.shape[2:])
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
        geometry = stride, before, dilation
        backend = choose("grouped_conv2d", input, weight, groups, geometry, optional=weight.shape[1] > 1)
        if backend != "reference":
            if problem is not None and input.dim() == 4 and padding_mode == "zeros" and before == after:
                native.remember(backend, True, *call)
                if dtype is None:
                    remember(problem, (*geometry, backend))
            batched = input.unsqueeze(0) if input.dim() == 3 else input
            output = apply(GroupedConv2d, batched, weight, bias, *geometry, backend)
            return output.squeeze(0) if input.dim() == 3 else output
    return reference.conv2d(input, weight, bias, stride, before, dilation, groups)


def pads(
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
