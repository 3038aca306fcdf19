"""What a set of images is, whatever its source; and the set that is held in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Data", "ImageSet", "MemoryImages", "to_float"]


class ImageSet(ABC):
    """Labelled images of one shape. Nothing changes after construction, so threads may share a set.

    Attributes:
        labels: ``[N]``, int64: places in ``classes``.
        classes: names of the classes.
        shape: ``(C, H, W)`` of every image.
        mirrored: whether a mirrored image is still of its class: photographs are, digits are not.
        in_memory: whether taking an image costs little; otherwise it is worth taking the next ones ahead.
    """

    labels: Tensor
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mirrored: bool
    in_memory: bool = True

    def __len__(self) -> int:
        """The number of images, ``N``."""
        return len(self.labels)

    @abstractmethod
    def take(self, rows: Tensor) -> Tensor:
        """The images ``rows`` (``[B]``, int64) as ``[B, C, H, W]``, float32 from 0 to 1, in a new tensor.

        The same rows give the same images to the bit, in any thread.
        """

    @abstractmethod
    def subset(self, rows: Tensor) -> ImageSet:
        """The set of the images ``rows`` (``[M]``, int64) alone, in this order, with the same classes."""


@dataclass(frozen=True)
class Data:
    """A source of images, loaded.

    Attributes:
        name: for people.
        train: the training images.
        test: the test images, of the same shape and classes.
        skipped: one line for each file that was left out, with the reason.
    """

    name: str
    train: ImageSet
    test: ImageSet
    skipped: tuple[str, ...] = ()


class MemoryImages(ImageSet):
    """Images held in memory.

    Args:
        images: ``[N, C, H, W]``, uint8 from 0 to 255 or float32 from 0 to 1; kept as they are, in ``images``.
        labels: ``[N]``, int64.
        classes: names of the classes; None names them by their numbers.
        mirrored: whether a mirrored image is still of its class.

    Raises:
        ValueError: shapes or dtypes are others, or a label has no class.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, classes: Sequence[str] | None = None, *, mirrored: bool = False
    ) -> None:
        if images.ndim != 4 or images.dtype not in (torch.uint8, torch.float32):
            found = f"{list(images.shape)}, {images.dtype}"
            raise ValueError(f"images ({found}) must be [N, C, H, W], torch.uint8 or torch.float32")
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            found = f"{list(labels.shape)}, {labels.dtype}"
            raise ValueError(f"labels ({found}) must be [{len(images)}], torch.int64: one per image")
        low, high = (int(end) for end in labels.aminmax()) if len(labels) else (0, -1)
        if classes is None:
            classes = [str(number) for number in range(high + 1)]
        if low < 0 or high >= len(classes):
            raise ValueError(f"labels (from {low} to {high}) must be from 0 to {len(classes) - 1}: places in classes")
        self.images = images
        self.labels = labels
        self.classes = tuple(classes)
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self.mirrored = mirrored

    def take(self, rows: Tensor) -> Tensor:
        return to_float(self.images[rows])

    def subset(self, rows: Tensor) -> MemoryImages:
        return MemoryImages(self.images[rows], self.labels[rows], self.classes, mirrored=self.mirrored)


def to_float(images: Tensor) -> Tensor:
    """uint8 from 0 to 255 as float32 from 0 to 1; float32 as it is."""
    return images if images.dtype == torch.float32 else images.to(torch.float32).div_(255)
