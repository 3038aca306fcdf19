"""Autocast, as PyTorch's convolution follows it. Imports only torch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast leaves operations on the device of ``tensor`` alone."""
    device = tensor.device.type
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The type that autocast wants for a convolution on ``device``; None where it is off."""
    # Not torch.amp.is_autocast_available(), which the compiler of torch 2.11 cannot trace; meta has no autocast.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.dtype in (torch.float32, *HALVES) else tensor  # as autocast does
