"""The split of the digits."""

from __future__ import annotations

import sys

import pytest
import torch

from refconv_kernels.learning.data import digits
from refconv_kernels.learning.errors import MissingExtra


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


def test_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra, match=r'^sklearn cannot be imported .*pip install "refconv_kernels\[learn\]"$'):
        digits()
