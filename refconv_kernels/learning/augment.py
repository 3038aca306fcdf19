"""Augmentation: a random crop and a random mirror image, drawn apart from the images they are applied to."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

__all__ = ["apply_views", "draw_views"]


def draw_views(count: int, padding: int, mirror: bool, generator: Generator) -> Tensor:
    """Where each of ``count`` images is cropped, and whether it is mirrored.

    Drawn for the whole batch at once, so that several processes can each apply their part of the same draw.

    Args:
        count: number of images.
        padding: pixels on each side before the crop, hence the largest shift.
        mirror: draw whether to mirror, with probability 1/2; False never mirrors.
        generator: source of the numbers.

    Returns:
        ``[count, 3]``, int64: first row and first column of the crop, and 1 for a mirrored image.
    """
    places = torch.randint(2 * padding + 1, (count, 2), generator=generator)
    mirrored = torch.randint(2, (count, 1), generator=generator) * mirror
    return torch.cat([places, mirrored], 1)


def apply_views(images: Tensor, views: Tensor, padding: int) -> Tensor:
    """Each image of ``[B, C, H, W]`` padded with zeros, cropped back to ``H x W`` and perhaps mirrored.

    Args:
        images: ``[B, C, H, W]``.
        views: ``[B, 3]``, from :func:`draw_views` with the same ``padding``.
        padding: pixels on each side.

    Returns:
        ``[B, C, H, W]``, the same type, in channels_last layout.
    """
    height, width = images.shape[2:]
    row, column, mirrored = views.unsqueeze(2).to(images.device).unbind(1)  # [B, 1] each
    across = torch.arange(width, device=images.device)
    rows = row + torch.arange(height, device=images.device)
    columns = column + torch.where(mirrored == 1, width - 1 - across, across)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    picked = F.pad(images, [padding] * 4)[image, :, rows[:, :, None], columns[:, None, :]]  # [B, H, W, C]
    return picked.permute(0, 3, 1, 2)
