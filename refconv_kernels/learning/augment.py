"""Random changes to training images. What is drawn depends on the generator and on the number of images alone."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

__all__ = ["random_crop", "random_flip"]


def random_crop(images: Tensor, padding: int, generator: Generator) -> Tensor:
    """Each image of ``[B, C, H, W]`` padded with zeros and cropped back to ``H x W`` at a random place.

    Args:
        images: ``[B, C, H, W]``, any dtype.
        padding: pixels on each side, hence the largest shift.
        generator: source of the places, one row and one column per image; a generator of the CPU.

    Returns:
        ``[B, C, H, W]``, a new tensor.
    """
    height, width = images.shape[2:]
    windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)  # [B, C, rows, columns, H, W]
    places = torch.randint(2 * padding + 1, (2, len(images)), generator=generator)
    rows, columns = places.to(images.device)
    return windows[torch.arange(len(images), device=images.device), :, rows, columns]


def random_flip(images: Tensor, generator: Generator) -> Tensor:
    """Each image of ``[B, C, H, W]`` mirrored left to right with probability 1/2.

    Args:
        images: ``[B, C, H, W]``, any dtype.
        generator: source of the choices, one per image; a generator of the CPU.

    Returns:
        ``[B, C, H, W]``, a new tensor.
    """
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(3), images)
