"""Sizes and memory formats of a convolution's feature maps, as PyTorch has them. Imports only torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def output_size(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Rows and columns of the output; below 1 where the kernel does not fit."""
    height, width = (
        (input.shape[d - 2] + 2 * padding[d] - dilation[d] * (weight.shape[d - 2] - 1) - 1) // stride[d] + 1
        for d in (0, 1)
    )
    return height, width


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor is channels_last in memory and not contiguous as well."""
    if tensor.dim() != 4 or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last)


def output_format(*tensors: Tensor) -> torch.memory_format:
    """The memory format of what is made of ``tensors``: channels_last where one of them is."""
    return torch.channels_last if any(map(is_channels_last, tensors)) else torch.contiguous_format
