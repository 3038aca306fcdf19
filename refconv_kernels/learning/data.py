"""Images to train on: scikit-learn's handwritten digits, which need no download, and the random crop."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

__all__ = ["DIGITS_TRAIN", "ImageSet", "MissingExtra", "digits", "random_crop", "require"]

#: Training images of the fixed split. The other 1197 are for testing: few enough training images that a
#: network still makes mistakes, enough test images (0.084 % each) to see a difference.
DIGITS_TRAIN = 600


class MissingExtra(ImportError):
    """A package of the ``learn`` extra is not installed."""


def require(name: str) -> Any:
    """Import a module of the ``learn`` extra.

    Raises:
        MissingExtra: it is not installed; the message names the ``pip`` command.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(
            f'{name.partition(".")[0]} cannot be imported ({error}): pip install "refconv_kernels[learn]"'
        ) from error


@dataclass(frozen=True)
class ImageSet:
    """Images ``[N, C, H, W]``, float32, and their labels ``[N]``, int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def digits(train_size: int = DIGITS_TRAIN) -> tuple[ImageSet, ImageSet]:
    """scikit-learn's 1797 handwritten digits, ``[N, 1, 8, 8]`` with ink from 0 to 1, in a stratified split.

    The split is the same at every call: it belongs to the data, not to a run.

    Args:
        train_size: number of training images.

    Returns:
        The training and the test images.

    Raises:
        MissingExtra: scikit-learn is not installed.
        ValueError: ``train_size`` leaves fewer than one image of each digit on either side.
    """
    source = require("sklearn.datasets").load_digits()
    split = require("sklearn.model_selection").train_test_split
    if not 10 <= train_size <= len(source.target) - 10:
        raise ValueError(f"train_size (={train_size}) must leave an image of each digit on both sides, 10 to 1787")
    rows = split(range(len(source.target)), train_size=train_size, stratify=source.target, random_state=0)
    # Not centred: the background stays 0, which is what cropping and convolutions pad with.
    images = torch.tensor(source.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(source.target, dtype=torch.int64)
    train, test = (ImageSet(images[chosen], labels[chosen]) for chosen in map(torch.tensor, rows))
    return train, test


def random_crop(images: Tensor, padding: int, generator: Generator) -> Tensor:
    """Each image of ``[B, C, H, W]`` padded with zeros and cropped back to ``H x W`` at a random place.

    Args:
        images: ``[B, C, H, W]``.
        padding: pixels on each side, hence the largest shift.
        generator: source of the places, one row and one column per image.
    """
    height, width = images.shape[2:]
    windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)  # [B, C, rows, columns, H, W]
    rows, columns = torch.randint(2 * padding + 1, (2, len(images)), generator=generator)
    return windows[torch.arange(len(images)), :, rows, columns]
