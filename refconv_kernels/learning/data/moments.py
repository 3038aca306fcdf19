"""Mean and standard deviation of images, to normalise by."""

from __future__ import annotations

import torch

from refconv_kernels.learning.data.images import ImageSet

__all__ = ["STATISTICS_IMAGES", "statistics"]

#: As many images fix both to about a thousandth; a large folder would take its time to read whole.
STATISTICS_IMAGES = 10_000
_BATCH = 256


def statistics(images: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, over at most 10,000 evenly spaced images.

    Args:
        images: the training images.

    Returns:
        The means and the standard deviations (of the pixels, not an estimate for others: divided by their
        number), ``C`` of each. A channel that is the same everywhere has 0.
    """
    count = min(len(images), STATISTICS_IMAGES)
    rows = torch.arange(count) * len(images) // count
    total = torch.zeros(images.shape[0], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for some in rows.split(_BATCH):
        pixels = images.take(some).to(torch.float64)
        total += pixels.sum((0, 2, 3))
        squares += pixels.square().sum((0, 2, 3))
    number = count * images.shape[1] * images.shape[2]
    mean = total / number
    deviation = (squares / number - mean.square()).clamp(min=0).sqrt()
    return tuple(mean.tolist()), tuple(deviation.tolist())
