"""Stratified splits: the same share of every class, and the same images at every call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from refconv_kernels.learning.data.images import ImageSet
from refconv_kernels.learning.errors import DataError

__all__ = ["TEST_SHARE", "hold_out", "split_rows"]

#: Share of the images that become test images where a source has no test images of its own.
TEST_SHARE = 0.2


def hold_out(images: ImageSet, share: float) -> tuple[ImageSet, ImageSet]:
    """Part of the training images set aside, to tune with: the test images are then for one look at the end.

    Args:
        images: the training images.
        share: of each class, rounded, but at least one image; between 0 and 1.

    Returns:
        The images kept and those held out, each in the order of ``images``. They depend on the labels and on
        ``share`` alone.

    Raises:
        ValueError: ``share`` is not between 0 and 1.
        DataError: a class has one image only.
    """
    kept, held = split_rows(images.labels, images.classes, share)
    return images.subset(kept), images.subset(held)


def split_rows(labels: Tensor, classes: Sequence[str], share: float) -> tuple[Tensor, Tensor]:
    """The rows that are kept and those held out, as :func:`hold_out` describes it, each ascending."""
    if not 0 < share < 1:
        raise ValueError(f"share (={share}) must be between 0 and 1, both excluded")
    generator = Generator().manual_seed(0)  # the split belongs to the data, not to a run
    held = torch.zeros(len(labels), dtype=torch.bool)
    for number, name in enumerate(classes):
        rows = (labels == number).nonzero().squeeze(1)
        if len(rows) == 1:
            raise DataError(f"class {name!r} has one image: a split needs at least two of each class")
        # Not every n-th row: what lies side by side in the source is often alike.
        order = rows[torch.randperm(len(rows), generator=generator)]
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        held[order[: max(0, count)]] = True
    return (~held).nonzero().squeeze(1), held.nonzero().squeeze(1)
