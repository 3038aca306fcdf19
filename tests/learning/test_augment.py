"""Crops and flips: what they do, and that only the generator decides."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from refconv_kernels.learning.augment import random_crop, random_flip


@pytest.mark.parametrize("shape", [(5, 1, 8, 8), (3, 2, 4, 6), (0, 1, 8, 8)])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_random_crop_shifts_each_image_by_at_most_the_padding(shape: tuple[int, ...], padding: int) -> None:
    images = torch.rand(shape)
    cropped = random_crop(images, padding, Generator().manual_seed(1))
    assert cropped.shape == images.shape
    padded = torch.nn.functional.pad(images, [padding] * 4)
    height, width = shape[2:]
    places = range(2 * padding + 1)
    for image, around in zip(cropped, padded, strict=True):
        assert any(torch.equal(image, around[:, r : r + height, c : c + width]) for r in places for c in places)


def test_random_crop_follows_its_generator_and_reaches_every_place() -> None:
    images = torch.arange(9.0).reshape(1, 1, 3, 3).expand(500, 1, 3, 3) + 1
    first, again = (random_crop(images, 1, Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert len(first.flatten(1).unique(dim=0)) == 9


def test_random_crop_pads_with_zeros() -> None:
    cropped = random_crop(torch.ones(200, 2, 4, 4), 4, Generator().manual_seed(0))
    assert cropped.flatten(1).sum(1).min() < 32
    assert set(cropped.unique().tolist()) == {0.0, 1.0}


def test_random_flip_mirrors_about_half_and_nothing_else() -> None:
    images = torch.rand(1000, 3, 4, 5)
    flipped = random_flip(images, Generator().manual_seed(0))
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert torch.equal(same, ~mirrored)
    assert 440 < mirrored.sum() < 560


def test_random_flip_chooses_each_image_anew_and_leaves_its_input() -> None:
    images = torch.arange(5.0).expand(64, 1, 2, 5).clone()
    generator = Generator().manual_seed(0)
    first, second = random_flip(images, generator), random_flip(images, generator)
    assert not torch.equal(first, second)
    assert torch.equal(images, torch.arange(5.0).expand(64, 1, 2, 5))
    assert torch.equal(first, random_flip(images, Generator().manual_seed(0)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_what_is_drawn_does_not_depend_on_the_images(dtype: torch.dtype) -> None:
    states = []
    for images in (torch.zeros(7, 1, 8, 8, dtype=dtype), torch.ones(7, 3, 32, 20, dtype=dtype)):
        generator = Generator().manual_seed(0)
        assert random_crop(images, 2, generator).dtype == random_flip(images, generator).dtype == dtype
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_no_images() -> None:
    none = torch.zeros(0, 3, 4, 4)
    assert random_flip(none, Generator()).shape == random_crop(none, 1, Generator()).shape == none.shape
