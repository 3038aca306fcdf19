"""Tensors that end where memory ends: one access beyond them stops the process."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_mapped: list[mmap.mmap] = []  # as long as the process: tensors point into them


def guarded(tensor: Tensor) -> Tensor:
    """A copy of a dense tensor, in its memory format, whose last byte lies right before a page that may not be touched."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE)
    area = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    _mapped.append(area)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    if _libc.mprotect(start + pages * mmap.PAGESIZE, mmap.PAGESIZE, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=pages * mmap.PAGESIZE - size)
    copy = torch.as_strided(flat, tensor.shape, tensor.stride())
    copy.copy_(tensor)
    return copy
