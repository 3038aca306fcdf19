"""Sizes and memory formats of a convolution's feature maps, as PyTorch has them. Imports only torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[int, int]  # of rows and columns
Geometry = tuple[Pair, Pair, Pair]  # stride, padding, dilation


def output_size(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Rows and columns of the output; below 1 where the kernel does not fit."""
    height, width = input.shape[-2:]
    kernel_h, kernel_w = weight.shape[-2:]
    return (
        (height + 2 * padding[0] - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1,
        (width + 2 * padding[1] - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1,
    )


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor is channels_last in memory and not contiguous as well."""
    if tensor.dim() != 4 or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last)


def output_format(*tensors: Tensor) -> torch.memory_format:
    """The memory format of what is made of ``tensors``: channels_last where one of them is."""
    return torch.channels_last if any(map(is_channels_last, tensors)) else torch.contiguous_format
