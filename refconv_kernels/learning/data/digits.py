"""scikit-learn's handwritten digits, which need no download."""

from __future__ import annotations

import torch

from refconv_kernels.learning.data.images import MemoryImages
from refconv_kernels.learning.errors import require

__all__ = ["DIGITS_TRAIN", "digits"]

#: Training images of the fixed split. The other 1197 are for testing: few enough training images that a
#: network still makes mistakes, enough test images (0.084 % each) to see a difference.
DIGITS_TRAIN = 600


def digits(train_size: int = DIGITS_TRAIN) -> tuple[MemoryImages, MemoryImages]:
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
    train, test = (MemoryImages(images[chosen], labels[chosen]) for chosen in map(torch.tensor, rows))
    return train, test
