"""What every launch needs: where, in which type, in which layout."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from refconv_kernels.backends.triton import INTERPRETED


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context whose current device is that of ``tensor``: Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def accumulator(tensor: Tensor) -> Any:
    """The type in which kernels over ``tensor`` compute."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def words(tensor: Tensor) -> int:
    """Registers that a value takes in kernels over ``tensor``."""
    return 2 if tensor.dtype == torch.float64 else 1


def power_of_2(size: int) -> int:
    """The least power of two that is at least ``size``."""
    return triton.next_power_of_2(size)


def options(tensor: Tensor, most: int | None = None) -> dict[str, Any]:
    """How to compile a kernel over ``tensor``: multiply-adds, ``most`` registers for a thread (255, all, for float64).

    Without a number of registers ptxas spills a few values to fit one more block on a multiprocessor.
    """
    if INTERPRETED:
        return {}
    chosen: dict[str, Any] = {"enable_fp_fusion": True}  # Triton's default until 3.9, which warns that it will not be
    if most is not None and not torch.version.hip:
        chosen["maxnreg"] = 255 if tensor.dtype == torch.float64 else most
    return chosen


def strides(feature_map: Tensor) -> tuple[int, int, int]:
    """Elements from one image, channel and pixel to the next, of a map that is NCHW or channels_last."""
    batch_stride, channel_stride, _, column_stride = feature_map.stride()
    return batch_stride, channel_stride, column_stride


def blocks(channels: int, channels_last: bool, held: int, warps: int = 4) -> tuple[int, int]:
    """BLOCK_P and BLOCK_C of a tile: in NCHW a strip for each thread, in channels_last up to 4 channels of one.

    ``held``: registers that the pixels of a strip take, for each of its channels.
    """
    block_c = min(power_of_2(channels), 64) if channels_last else 1
    each = 1 if not channels_last else 4 if held <= 16 else 2 if held <= 32 else 1
    return max(1, 32 * warps * each // block_c), block_c


def strip_rows(height: int, stride: int = 1, most: int = 8) -> int:
    """Pixels of a strip, in whole strides: as many as leave none over, if that is 4 or more; else about 4."""
    steps = range(max(1, most // stride), max(0, 3 // stride), -1)
    exact = (step * stride for step in steps if height % (step * stride) == 0)
    return next(exact, triton.cdiv(min(4, height), stride) * stride)


def met_rows(constants: dict[str, int], rows: int, tap_rows: int) -> dict[str, int]:
    """LOW and COUNT of the backward's tiles: which pixels of dy a strip of x meets through that many rows of taps."""
    pad, stride = constants["PAD_H"], constants["STRIDE_H"]
    low = -(((tap_rows - 1) * constants["DILATION_H"] - pad) // stride)
    return {"LOW": low, "COUNT": (pad + rows - 1) // stride - low + 1}


def constants(
    input: Tensor, weight: Tensor, out: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> dict[str, int]:
    values = {
        "IN": input.shape[2:], "OUT": out.shape[2:], "KERNEL": weight.shape[2:],
        "STRIDE": stride, "PAD": padding, "DILATION": dilation,
    }  # fmt: skip
    sizes = {f"{name}_{axis}": int(pair[d]) for name, pair in values.items() for d, axis in enumerate("HW")}
    return {"MULTIPLIER": weight.shape[0] // input.shape[1], **sizes}


def bias_tap(constants: dict[str, int]) -> int:
    """A tap at which the pixels of x meet every pixel of dy once; -1 when there is none."""
    tap = 0
    for axis in "HW":
        pad, dilation = constants[f"PAD_{axis}"], constants[f"DILATION_{axis}"]
        steps, rest = divmod(pad, dilation)
        reach = (constants[f"OUT_{axis}"] - 1) * constants[f"STRIDE_{axis}"]
        if rest or steps >= constants[f"KERNEL_{axis}"] or reach >= constants[f"IN_{axis}"]:
            return -1
        tap = tap * constants[f"KERNEL_{axis}"] + steps
    return tap
