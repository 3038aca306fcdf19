"""The native CPU backend: which problems its kernels cover, and why it is off where it is off.

The kernels are C++ (``csrc/cpu``); importing ``refconv_kernels._C`` registers them as the CPU
implementations of the ``refconv_cpu`` operators, whose schemas are in :mod:`refconv_kernels.ops`.
"""

from __future__ import annotations

import json
from importlib import resources
from types import ModuleType

import torch
from torch import Tensor

from refconv_kernels.geometry import Geometry, is_channels_last

_OPTIMIZED_DTYPES = (torch.float32, torch.float64)
_DTYPES = (*_OPTIMIZED_DTYPES, torch.bfloat16, torch.float16)
_ONEDNN_DTYPES = (torch.float32, torch.bfloat16)  # PyTorch runs them with oneDNN, the others far slower
_MOST_PER_GROUP = 16  # input channels of a group: a thread holds that many padded planes
# Of those, up to which the channels_last kernel is faster than PyTorch's; and in float32, with so many groups and taps.
_FASTER_PER_GROUP_LAST = 4
_FASTER_PER_GROUP_LAST_FLOAT32, _FEW_GROUPS, _FEW_TAPS = 6, 8, 9
_WIDE_ROW = 64  # entries of W_r per 2-D kernel from which the kernel takes a matrix product (csrc/cpu/refocus.cpp)

# Multiply-adds of narrower rows up to which PyTorch's call costs more than its loops gain.
_NARROW_WORK = 200_000

native: ModuleType | None
_import_error: str | None
try:
    from refconv_kernels import _C as native  # type: ignore[attr-defined,no-redef]

    _import_error = None
except ImportError as error:
    native, _import_error = None, str(error)


def unavailable() -> str | None:
    """Why the native library cannot be used, in one line; None when it can."""
    if native is not None:
        return None
    reason = why_not_built("_C")
    return f"the native library was not built: {reason}" if reason else f"the native library: {_import_error}"


def why_not_built(extension: str) -> str | None:
    """What the installation noted about an extension, ``_C`` or ``_autograd``, that it could not build."""
    try:
        note = json.loads(resources.files("refconv_kernels").joinpath("_build.json").read_text())
        return str(note["skipped"]) if note["extension"] == extension else None
    except (OSError, KeyError, ValueError):
        return None


def _limits(tensor: Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if not tensor.is_cpu:
        return f"{name} is on {tensor.device}, the kernel runs on cpu"
    if tensor.dtype not in dtypes:
        covered = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"{name} has dtype {tensor.dtype}, the kernel covers {covered}"
    return None


def refocus_weight_limits(basis: Tensor, refocus: Tensor) -> str | None:
    """Why the ``refocus_weight`` kernel does not cover this problem; None when it does."""
    return _limits(basis, "basis", _DTYPES)


def refocus_weight_slower(basis: Tensor, refocus: Tensor) -> str | None:
    """Why ``"auto"`` leaves this problem to PyTorch (``docs/performance.md``); None when it does not."""
    if basis.dtype == torch.float64 or _is_wide(refocus) or _is_dense_3x3(basis, refocus):
        return None
    work = refocus.numel() * basis.shape[2] * basis.shape[3]
    if work > _NARROW_WORK:
        return f"refocus groups of {refocus.shape[1]} kernels, {work} multiply-adds: PyTorch's is faster"
    return None


def refocus_weight_how(basis: Tensor, refocus: Tensor) -> str:
    """Which of the kernels (``csrc/cpu/refocus.cpp``), in words."""
    rows = f"rows of {refocus[0].numel()} entries"
    if _is_wide(refocus):
        return f"as a product with the unfolded basis: {rows}, {_WIDE_ROW} at least"
    if _is_dense_3x3(basis, refocus):
        return "with as many 3x3 kernels at once as a vector has lanes: dense, 3x3 taps"
    return f"with scalar code: {rows}"


def _is_wide(refocus: Tensor) -> bool:
    return refocus.shape[1] * refocus.shape[2] ** 2 >= _WIDE_ROW


def _is_dense_3x3(basis: Tensor, refocus: Tensor) -> bool:
    return refocus.shape[1:] == (1, 3, 3) and basis.shape[2:] == (3, 3)


def thin_refocus_weight_limits(basis: Tensor, coordinates: Tensor, factor: Tensor) -> str | None:
    """Why the ``thin_refocus_weight`` kernel does not cover this problem; None when it does."""
    return _limits(basis, "basis", _DTYPES)


def thin_refocus_weight_slower(basis: Tensor, coordinates: Tensor, factor: Tensor) -> str | None:
    """``"auto"`` always takes this kernel where it covers the problem."""
    return None


def grouped_conv2d_limits(input: Tensor, weight: Tensor, groups: int, geometry: Geometry) -> str | None:
    """Why the ``grouped_conv2d`` kernel does not cover this problem; None when it does."""
    if groups == 1 and input.shape[-3] != 1:
        return "groups (=1): the kernel is for grouped and depthwise convolutions"
    if weight.shape[1] > _MOST_PER_GROUP:
        return f"in_channels / groups (={weight.shape[1]}), the kernel covers at most {_MOST_PER_GROUP}"
    return _limits(input, "input", _DTYPES)


def grouped_conv2d_slower(input: Tensor, weight: Tensor, groups: int, geometry: Geometry) -> str | None:
    """Why ``"auto"`` leaves this problem to PyTorch (``docs/performance.md``); None when it does not."""
    if input.dtype not in _ONEDNN_DTYPES:
        return None
    per_group = weight.shape[1]
    if per_group % 8 == 0:
        return f"in_channels / groups (={per_group}) is a multiple of 8: PyTorch's is faster"
    many = input.dtype == torch.float32 and groups >= _FEW_GROUPS and weight.shape[2] * weight.shape[3] >= _FEW_TAPS
    most = _FASTER_PER_GROUP_LAST_FLOAT32 if many else _FASTER_PER_GROUP_LAST
    if per_group > most and (is_channels_last(input) or is_channels_last(weight)):
        return f"in_channels / groups (={per_group}) in channels_last: PyTorch's is faster above {most}"
    return None


def grouped_conv2d_how(input: Tensor, weight: Tensor, groups: int, geometry: Geometry) -> str:
    """Which of the kernels (``csrc/bindings/convolution.cpp``) runs the forward, in words."""
    assert native is not None
    layout = is_channels_last(input) or is_channels_last(weight)
    shapes = (list(t.shape) for t in (input, weight))
    return f"by {native.grouped_kernel(*shapes, *map(list, geometry), layout, input.element_size())}"


def refconv2d_limits(input: Tensor, basis: Tensor, refocus: Tensor, groups: int, geometry: Geometry) -> str | None:
    """Why the ``refconv2d`` kernel, both steps in one call, does not cover this problem; None when it does."""
    return refocus_weight_limits(basis, refocus) or _limits(input, "input", _DTYPES)


def refconv2d_slower(input: Tensor, basis: Tensor, refocus: Tensor, groups: int, geometry: Geometry) -> str | None:
    """Why ``"auto"`` takes the two steps one by one (``docs/performance.md``); None when it does not."""
    return refocus_weight_slower(basis, refocus)


def refconv2d_how(input: Tensor, basis: Tensor, refocus: Tensor, groups: int, geometry: Geometry) -> str:
    """Which kernels run the two steps, in words."""
    transform = refocus_weight_how(basis, refocus)
    return f"{transform}; convolved {_convolved(input, basis, groups, geometry)}"


def _convolved(input: Tensor, basis: Tensor, groups: int, geometry: Geometry) -> str:
    """By which kernel, or why by PyTorch."""
    problem = input, basis, groups, geometry
    reason = grouped_conv2d_limits(*problem) or grouped_conv2d_slower(*problem)
    return grouped_conv2d_how(*problem) if reason is None else f"by PyTorch: {reason}"


def thin_refconv2d_limits(
    input: Tensor, basis: Tensor, coordinates: Tensor, factor: Tensor, groups: int, geometry: Geometry
) -> str | None:
    """Why the ``thin_refconv2d`` kernel, both steps in one call, does not cover this problem; None when it does."""
    return thin_refocus_weight_limits(basis, coordinates, factor) or _limits(input, "input", _DTYPES)


def thin_refconv2d_slower(
    input: Tensor, basis: Tensor, coordinates: Tensor, factor: Tensor, groups: int, geometry: Geometry
) -> str | None:
    """``"auto"`` always takes this kernel where it covers the problem."""
    return None


def thin_refconv2d_how(
    input: Tensor, basis: Tensor, coordinates: Tensor, factor: Tensor, groups: int, geometry: Geometry
) -> str:
    """Which kernel runs the convolution, in words."""
    return f"with W_t made in the same call; convolved {_convolved(input, basis, groups, geometry)}"


def folded_adam_limits(first: Tensor) -> str | None:
    """Why the ``folded_adam`` kernel does not cover this problem; None when it does."""
    return _limits(first, "first", _OPTIMIZED_DTYPES)


def folded_adam_slower(first: Tensor) -> None:
    """None: PyTorch's matrix products are never faster (``docs/performance.md``)."""


def fused_sgd_limits(basis: Tensor, refocus: Tensor) -> str | None:
    """Why the ``fused_sgd`` kernel does not cover this problem; None when it does."""
    if basis.shape[2:] != (3, 3) or not (_is_wide(refocus) or _is_dense_3x3(basis, refocus)):
        shapes = f"W_b {tuple(basis.shape)}, W_r {tuple(refocus.shape)}"
        return f"{shapes}: the kernel is for 3x3 kernels, dense or with rows of W_r of {_WIDE_ROW} entries"
    if not (basis.is_contiguous() and refocus.is_contiguous()):
        return "the weights are not contiguous"
    return _limits(basis, "basis", _OPTIMIZED_DTYPES)


def fused_sgd_slower(basis: Tensor, refocus: Tensor) -> None:
    """None: one pass is never slower than three (``docs/performance.md``)."""
