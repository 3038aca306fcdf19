"""Sets of images in memory, splits, statistics, and the choice of the source."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from refconv_kernels.learning.data import MemoryImages, digits, hold_out, load, moments, statistics
from refconv_kernels.learning.errors import DataError


def some(count: int = 60, classes: int = 3, dtype: torch.dtype = torch.uint8) -> MemoryImages:
    images = torch.randint(256, (count, 3, 4, 5)).to(torch.uint8)
    labels = torch.arange(count) % classes
    return MemoryImages(images if dtype == torch.uint8 else images / 255, labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_take_gives_floats_in_the_order_asked_for(dtype: torch.dtype) -> None:
    data = some(dtype=dtype)
    rows = torch.tensor([5, 0, 5])
    taken = data.take(rows)
    assert (taken.dtype, taken.shape) == (torch.float32, (3, 3, 4, 5))
    assert torch.equal(taken, data.images[rows] / 255 if dtype == torch.uint8 else data.images[rows])
    taken.zero_()
    assert data.images[5].any()  # a new tensor
    assert data.take(rows[:0]).shape == (0, 3, 4, 5)


def test_take_from_many_threads_at_once() -> None:
    data = some()
    rows = [torch.randperm(60) for _ in range(40)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(data.take, rows))
    assert all(torch.equal(result, data.images[r] / 255) for result, r in zip(results, rows, strict=True))


def test_subset_keeps_order_classes_and_mirroring() -> None:
    data = MemoryImages(some().images, some().labels, ("a", "b", "c"), mirrored=True)
    part = data.subset(torch.tensor([7, 3]))
    assert torch.equal(part.images, data.images[[7, 3]])
    assert part.labels.tolist() == [1, 0]
    assert (part.classes, part.mirrored, part.shape, len(part)) == (("a", "b", "c"), True, (3, 4, 5), 2)


def test_classes_have_numbers_for_names_by_default() -> None:
    assert some().classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2).long(), r"images \(\[2, 3, 4\], torch.float32\) must be \[N, C, H, W\]"),
        (torch.zeros(2, 1, 3, 4).double(), torch.zeros(2).long(), r"torch.float64\) must be"),
        (torch.zeros(2, 1, 3, 4), torch.zeros(3).long(), r"labels \(\[3\], torch.int64\) must be \[2\], torch.int64"),
        (torch.zeros(2, 1, 3, 4), torch.zeros(2), r"labels \(\[2\], torch.float32\) must be"),
        (torch.zeros(2, 1, 3, 4), torch.tensor([-1, 0]), r"labels \(from -1 to 0\) must be from 0 to 0"),
    ],
)
def test_tensors_of_other_kinds_raise(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryImages(images, labels)


def test_label_without_a_class_raises() -> None:
    with pytest.raises(ValueError, match=r"labels \(from 0 to 2\) must be from 0 to 1: places in classes"):
        MemoryImages(some().images, some().labels, ("a", "b"))


def test_hold_out_is_stratified_and_the_same_every_time() -> None:
    labels = torch.tensor([0] * 100 + [1] * 10 + [2] * 2)[torch.randperm(112)]
    data = MemoryImages(torch.rand(112, 1, 2, 2), labels)
    kept, held = hold_out(data, 0.2)
    assert held.labels.bincount().tolist() == [20, 2, 1]
    assert kept.labels.bincount().tolist() == [80, 8, 1]
    every = [*kept.take(torch.arange(len(kept))), *held.take(torch.arange(len(held)))]
    assert sorted(image.flatten().tolist() for image in every) == sorted(data.images.flatten(1).tolist())
    torch.rand(1)
    again = hold_out(data, 0.2)
    assert all(torch.equal(a.images, b.images) for a, b in zip((kept, held), again, strict=True))  # type: ignore[attr-defined]
    assert len(hold_out(data, 0.999)[0]) == 3  # each class keeps an image


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_share_out_of_range_raises(share: float) -> None:
    with pytest.raises(ValueError, match=rf"share \(={share}\) must be between 0 and 1"):
        hold_out(some(), share)


def test_class_with_one_image_cannot_be_split() -> None:
    data = MemoryImages(torch.zeros(3, 1, 2, 2), torch.tensor([0, 0, 1]), ("cat", "dog"))
    with pytest.raises(DataError, match="class 'dog' has one image: a split needs at least two of each class"):
        hold_out(data, 0.5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_statistics_are_those_of_the_pixels(dtype: torch.dtype) -> None:
    data = some(700, dtype=dtype)
    pixels = data.take(torch.arange(700)).double().transpose(0, 1).flatten(1)
    mean, deviation = statistics(data)
    assert mean == pytest.approx(pixels.mean(1).tolist(), rel=1e-12)
    assert deviation == pytest.approx(pixels.std(1, correction=0).tolist(), rel=1e-10)


def test_statistics_of_equal_pixels() -> None:
    mean, deviation = statistics(MemoryImages(torch.full((9, 1, 3, 3), 51, dtype=torch.uint8), torch.zeros(9).long()))
    assert mean == pytest.approx((0.2,))
    assert deviation == pytest.approx((0.0,), abs=1e-6)


def test_statistics_look_at_evenly_spaced_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "STATISTICS_IMAGES", 4)
    data = MemoryImages(torch.arange(10.0).view(10, 1, 1, 1) / 10, torch.zeros(10).long())
    assert statistics(data)[0] == pytest.approx(((0 + 2 + 5 + 7) / 40,))


def test_digits_are_the_default() -> None:
    data = load()
    assert (data.name, data.skipped, data.train.shape, data.train.mirrored) == ("digits", (), (1, 8, 8), False)
    rows = torch.arange(600)
    assert torch.equal(data.train.take(rows), digits()[0].images)
    assert load("digits", image_size=8).test.classes == tuple("0123456789")


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist: the data is 'digits', a folder or an .npz file"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"digits has images of 8 x 8, image_size is 32: it applies to folders"):
        load("digits", image_size=32)
    with pytest.raises(DataError, match=r"image_size \(=0\) must be at least 1"):
        load("digits", image_size=0)


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(DataError, match=rf"^{tmp_path} cannot be read: Permission denied$"):
        load(str(tmp_path))
