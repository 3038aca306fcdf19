"""The Triton GPU backend (NVIDIA and AMD): which problems its kernels cover.

Its operators are in :mod:`.operators`, the kernels in :mod:`.depthwise_kernels` (over :mod:`.depthwise_tiles`),
:mod:`.reduction`, :mod:`.refocus`, :mod:`.fused`, :mod:`.thin` and :mod:`.folded_adam`; Triton is imported when one is
first launched. With ``TRITON_INTERPRET=1`` in the environment, Triton's interpreter runs them on tensors in main
memory, slowly, for tests.
"""

from __future__ import annotations

import os
from importlib import util
from typing import Any

import torch
from torch import Tensor

from refconv_kernels.backends.triton.operators import IMPLEMENTATIONS as IMPLEMENTATIONS
from refconv_kernels.geometry import Geometry

_REFOCUS_DTYPES = (torch.float32, torch.float64)
_CONV_DTYPES = (*_REFOCUS_DTYPES, torch.bfloat16, torch.float16)
_LARGEST_KERNEL = 31
_CHANNEL_LIMIT = 65536  # a launch has that many programs in its second direction
_INDEX_LIMIT = 2**31  # within one image, and for the pixels of a batch, indices have 32 bits

#: Whether Triton's interpreter stands in for a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _switch(name: str) -> bool:
    value = os.environ.get(name) or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{name} (={value!r}) must be 0 or 1")
    return value == "1"


#: Whether depthwise launches are measured and the fastest configuration is taken (:mod:`.tuning`).
AUTOTUNE = _switch("REFCONV_AUTOTUNE")


def unavailable() -> str | None:
    """Why the Triton kernels cannot be used, in one line; None when they can."""
    if util.find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.version.cuda is None and torch.version.hip is None and not INTERPRETED:
        return "this torch has no GPU support"
    return None


def _limits(tensor: Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    device = "cpu" if INTERPRETED else "cuda"
    if tensor.device.type != device:
        return f"{name} is on {tensor.device}, the kernel runs on {device}"
    if tensor.dtype not in dtypes:
        covered = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"{name} has dtype {tensor.dtype}, the kernel covers {covered}"
    return None


def refocus_weight_limits(basis: Tensor, refocus: Tensor) -> str | None:
    """Why the ``refocus_weight`` kernel does not cover this problem; None when it does."""
    return _limits(basis, "basis", _REFOCUS_DTYPES)


def grouped_conv2d_limits(input: Tensor, weight: Tensor, groups: int, geometry: Geometry) -> str | None:
    """Why the ``grouped_conv2d`` kernel does not cover this problem; None when it does."""
    if groups != input.shape[-3] or weight.shape[1] != 1:
        return f"groups (={groups}) differs from in_channels (={input.shape[-3]}), the kernel is depthwise"
    if max(weight.shape[2:]) > _LARGEST_KERNEL:
        return f"kernel_size (={tuple(weight.shape[2:])}), the kernel covers at most {_LARGEST_KERNEL}"
    if weight.shape[0] >= _CHANNEL_LIMIT:
        return f"out_channels (={weight.shape[0]}), the kernel covers less than {_CHANNEL_LIMIT}"
    pixels = max(input.shape[-1] * input.shape[-2], 1)
    batch = input.shape[0] if input.dim() == 4 else 1
    if pixels * max(batch, weight.shape[0]) >= _INDEX_LIMIT:
        return f"input.shape (={tuple(input.shape)}) is beyond 2^31 pixels, or elements of an image"
    return _limits(input, "input", _CONV_DTYPES)


def refconv2d_limits(input: Tensor, basis: Tensor, refocus: Tensor, groups: int, geometry: Geometry) -> str | None:
    """Why the ``refconv2d`` kernels, both steps in one call, do not cover this problem; None when they do."""
    return refocus_weight_limits(basis, refocus) or _limits(input, "input", _CONV_DTYPES)


def refconv2d_how(input: Tensor, basis: Tensor, refocus: Tensor, groups: int, geometry: Geometry) -> str:
    """Whether the two steps are one kernel each way, and why."""
    from refconv_kernels.backends.triton import fused

    reason = grouped_conv2d_limits(input, basis, groups, geometry)
    if reason is not None:
        return f"with a kernel for W_t; convolved by PyTorch: {reason}"
    pixels = input.shape[0] * input.shape[2] * input.shape[3]
    facts = f"{basis.shape[0]} channels of {pixels} pixels in {'x'.join(map(str, basis.shape[2:]))} kernels"
    if fused.fuses(input, basis):
        return f"as one kernel each way: {facts}, NCHW"
    rule = (
        f"one kernel takes NCHW, {fused.FEWEST_CHANNELS} channels of {fused.MOST_PIXELS} pixels, {fused.MOST_TAPS} taps"
    )
    return f"as separate kernels: {facts}; {rule}"


def thin_refocus_weight_limits(basis: Tensor, coordinates: Tensor, factor: Tensor) -> str | None:
    """Why the ``thin_refocus_weight`` kernel does not cover this problem; None when it does."""
    return _limits(basis, "basis", _CONV_DTYPES)


def thin_refconv2d_limits(
    input: Tensor, basis: Tensor, coordinates: Tensor, factor: Tensor, groups: int, geometry: Geometry
) -> str | None:
    """Why the ``thin_refconv2d`` kernels, both steps in one call, do not cover this problem; None when they do."""
    return thin_refocus_weight_limits(basis, coordinates, factor) or _limits(input, "input", _CONV_DTYPES)


def thin_refconv2d_how(
    input: Tensor, basis: Tensor, coordinates: Tensor, factor: Tensor, groups: int, geometry: Geometry
) -> str:
    """Whether the convolution's kernels make ``W_t`` themselves, and why."""
    from refconv_kernels.backends.triton import thin

    reason = grouped_conv2d_limits(input, basis, groups, geometry)
    if reason is not None:
        return f"with a kernel for W_t; convolved by PyTorch: {reason}"
    multiplier = basis.shape[0] // input.shape[1]
    facts = f"{factor.shape[1]} coordinates for {'x'.join(map(str, basis.shape[2:]))} kernels, multiplier {multiplier}"
    if thin.in_registers(input, basis, factor):
        return f"with W_t made in registers: {facts}"
    rule = f"registers take {thin.MOST} coordinates and taps at most, and multiplier 1"
    return f"with a kernel of its own for W_t: {facts}; {rule}"


def folded_adam_limits(first: Tensor) -> str | None:
    """Why the ``folded_adam`` kernels do not cover this problem; None when they do."""
    return _limits(first, "first", _REFOCUS_DTYPES)


def _slower(*_: Any) -> str | None:
    """Why ``"auto"`` leaves a problem to PyTorch; None when it does not."""
    return "Triton's interpreter is for tests" if INTERPRETED else None


refocus_weight_slower = grouped_conv2d_slower = refconv2d_slower = _slower
thin_refocus_weight_slower = thin_refconv2d_slower = folded_adam_slower = _slower


#: The dispatch key that the operators are registered for.
DISPATCH_KEY = "CPU" if INTERPRETED else "CUDA"
