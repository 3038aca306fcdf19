"""Which images a step sees: a function of seed, epoch and step alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Generator, Tensor

from refconv_kernels.learning.augment import apply_views, draw_views
from refconv_kernels.learning.data import ImageSet
from refconv_kernels.learning.distributed import Processes
from refconv_kernels.learning.errors import SettingsError
from refconv_kernels.learning.recipe import Recipe

__all__ = ["Batches", "Presented"]


class Presented:
    """Images as a network is shown them: ``(image - mean) / std``, on its device, in its layout.

    Args:
        mean, std: per channel; None leaves the images as they are.
        device: where they go.
        layout: their memory format.
    """

    def __init__(
        self,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        device: torch.device,
        layout: torch.memory_format,
    ) -> None:
        self.device, self.layout = device, layout
        self.channels = None if mean is None or std is None else (len(mean), len(std))
        if mean is not None and std is not None:
            self._mean, self._std = (torch.tensor(numbers)[:, None, None] for numbers in (mean, std))
            self._std[self._std < 1e-6] = 1.0  # a channel that is the same everywhere

    def __call__(self, images: Tensor) -> Tensor:
        if self.channels is not None:
            images = (images - self._mean) / self._std
        return images.to(self.device, non_blocking=True).contiguous(memory_format=self.layout)


class Batches:
    """The batches of a training, cropped and mirrored; with several processes, this one's part of each.

    Args:
        data: the images.
        recipe: size of the batches, crop and flip.
        seed: of order and augmentation.
        presented: what is done to the images last.
        processes: among which each batch is shared out.

    Raises:
        SettingsError: the last batch of an epoch cannot be shared out, or ``presented`` is for other channels.
    """

    def __init__(self, data: ImageSet, recipe: Recipe, seed: int, presented: Presented, processes: Processes) -> None:
        self.data, self.size, self.seed, self.presented, self.processes = (
            data,
            recipe.batch_size,
            seed,
            presented,
            processes,
        )
        self.steps = recipe.steps_per_epoch(len(data))
        self.padding = data.shape[1] // 8 if recipe.crop_padding is None else recipe.crop_padding
        self.mirror = data.mirrored if recipe.flip is None else recipe.flip
        parts, smallest = processes.size * recipe.accumulation, (len(data) - 1) % self.size + 1
        if smallest < parts:
            raise SettingsError(
                f"batch_size (={self.size}) leaves {smallest} of {len(data)} images for the last batch of an epoch, "
                f"fewer than the {parts} parts it is split into: choose another"
            )
        if presented.channels not in (None, (data.shape[0],) * 2):
            raise SettingsError(f"mean and std must be {data.shape[0]} numbers each, one per channel of the images")
        self._order: tuple[int, Tensor] | None = None
        self._ahead: tuple[tuple[int, int], Future] | None = None
        ahead = presented.device.type != "cpu" or not data.in_memory  # a CPU that trains has no time left
        self._loader = ThreadPoolExecutor(1) if ahead else None

    def get(self, epoch: int, step: int) -> tuple[Tensor, Tensor, int]:
        """Images ``[B, C, H, W]`` and labels ``[B]`` of this process, and the number of images in all of them."""
        if self._loader is None:
            return self._make(epoch, step)
        if self._ahead is None or self._ahead[0] != (epoch, step):
            self._ahead = (epoch, step), self._loader.submit(self._make, epoch, step)
        batch = self._ahead[1].result()
        following = (epoch, step + 1) if step + 1 < self.steps else (epoch + 1, 0)
        self._ahead = following, self._loader.submit(self._make, *following)
        return batch

    def close(self) -> None:
        """No more batches are wanted."""
        if self._loader is not None:
            self._loader.shutdown(cancel_futures=True)

    def _make(self, epoch: int, step: int) -> tuple[Tensor, Tensor, int]:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, torch.randperm(len(self.data), generator=_generator(self.seed, epoch))
        rows = self._order[1][step * self.size : (step + 1) * self.size]
        views = draw_views(len(rows), self.padding, self.mirror, _generator(self.seed, epoch, step))
        mine = self.processes.share(rows)
        images = apply_views(self.data.take(mine), self.processes.share(views), self.padding)
        labels = self.data.labels[mine].to(self.presented.device, non_blocking=True)
        return self.presented(images), labels, len(rows)


def _generator(*numbers: int) -> Generator:
    """Numbers for one purpose: a function of ``numbers`` alone."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
