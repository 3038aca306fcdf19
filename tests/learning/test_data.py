"""The split of the digits, and the random crop."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Generator

from refconv_kernels.learning.data import MissingExtra, digits, random_crop, require


def test_digits_have_their_shapes_and_range() -> None:
    train, test = digits()
    assert (len(train), len(test)) == (600, 1197)
    for part in (train, test):
        assert part.images.shape == (len(part), 1, 8, 8)
        assert (part.images.dtype, part.labels.dtype) == (torch.float32, torch.int64)
        assert (part.images.min().item(), part.images.max().item()) == (0.0, 1.0)


def test_split_is_stratified() -> None:
    train, test = digits()
    share = torch.stack([part.labels.bincount(minlength=10) / len(part) for part in (train, test)])
    assert share.shape == (2, 10)
    assert (share[0] - share[1]).abs().max() < 0.003


def test_split_is_the_same_every_time_and_loses_nothing() -> None:
    first, again = digits(), digits()
    assert all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(first, again, strict=True)
    )
    every = sorted(tuple(image) for part in first for image in part.images.flatten(1).tolist())
    other = sorted(tuple(image) for part in digits(900) for image in part.images.flatten(1).tolist())
    assert every == other  # whatever the split, each image is in it once


def test_no_image_is_on_both_sides() -> None:
    train, test = ({tuple(image) for image in part.images.flatten(1).tolist()} for part in digits())
    assert not train & test


@pytest.mark.parametrize("train_size", [10, 1787])
def test_the_smallest_splits_have_every_digit(train_size: int) -> None:
    assert all(len(part.labels.unique()) == 10 for part in digits(train_size))


@pytest.mark.parametrize("train_size", [0, 9, 1788, 1797])
def test_split_without_room_for_every_digit_raises(train_size: int) -> None:
    with pytest.raises(ValueError, match=rf"train_size \(={train_size}\) must leave an image of each digit"):
        digits(train_size)


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


def test_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra, match=r'^sklearn cannot be imported .*pip install "refconv_kernels\[learn\]"$'):
        digits()
    with pytest.raises(MissingExtra, match="no_such_package"):
        require("no_such_package.inner")
