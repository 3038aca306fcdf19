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


def power_of_2(size: int) -> int:
    """The least power of two that is at least ``size``."""
    return triton.next_power_of_2(size)


def registers(tensor: Tensor, most: int) -> dict[str, Any]:
    """The option that lets a thread have so many registers, 255 (all) for float64.

    Without it ptxas spills a few values to fit one more block on a multiprocessor.
    """
    if INTERPRETED or torch.version.hip:
        return {}
    return {"maxnreg": 255 if tensor.dtype == torch.float64 else most}
