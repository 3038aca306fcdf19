"""Archives of arrays and of JPEG files."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from refconv_kernels.learning.data import load
from refconv_kernels.learning.errors import DataError, MissingExtra

from .files import encoded, picture

LABELS = np.arange(10) % 2


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def saved(path: Path, **arrays: Any) -> str:
    np.savez_compressed(path / "some.npz", **arrays)
    return str(path / "some.npz")


@pytest.mark.parametrize(
    "names",
    [("x_train", "y_train", "x_test", "y_test"), ("train_images", "train_labels", "test_images", "test_labels")],
)
@pytest.mark.parametrize("column", [False, True])
def test_both_sides_given(tmp_path: Path, names: tuple[str, ...], column: bool) -> None:
    train, test = pixels(10, 6, 6, 3), pixels(4, 6, 6, 3)
    labels = LABELS[:, None] if column else LABELS
    data = load(saved(tmp_path, **dict(zip(names, (train, labels, test, labels[:4].astype("uint8")), strict=True))))
    assert (data.name, data.skipped, data.train.classes) == ("some", (), ("0", "1"))
    assert (data.train.shape, data.train.mirrored, data.test.mirrored) == ((3, 6, 6), True, True)
    expected = torch.from_numpy(train).permute(0, 3, 1, 2) / 255
    assert torch.equal(data.train.take(torch.arange(10)), expected)
    assert data.train.labels.tolist() == LABELS.tolist()
    assert data.test.labels.tolist() == LABELS[:4].tolist()
    assert len(data.test) == 4


@pytest.mark.parametrize(
    ("shape", "result"),
    [
        ((10, 5, 7), (1, 5, 7)),
        ((10, 5, 7, 3), (3, 5, 7)),
        ((10, 3, 5, 7), (3, 5, 7)),
        ((10, 5, 7, 1), (1, 5, 7)),
        ((10, 1, 5, 7), (1, 5, 7)),
        ((10, 5, 7, 4), (4, 5, 7)),
        ((10, 3, 4, 4), (3, 4, 4)),
    ],
)
def test_axes(tmp_path: Path, shape: tuple[int, ...], result: tuple[int, ...]) -> None:
    images = pixels(*shape)
    data = load(saved(tmp_path, images=images, labels=LABELS, is_test=LABELS[::-1] & (np.arange(10) < 4)))
    assert data.train.shape == result
    assert data.train.mirrored == (result[0] > 1)
    assert (len(data.train), len(data.test)) == (8, 2)
    assert load(saved(tmp_path, images=images[..., :5, :5] if len(shape) == 3 else images, labels=LABELS)).name


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_floats(tmp_path: Path, dtype: str) -> None:
    images = (pixels(10, 1, 4, 5) / 255).astype(dtype)
    data = load(saved(tmp_path, images=images, labels=LABELS.astype(">i4")))
    taken = torch.cat([part.take(torch.arange(len(part))) for part in (data.train, data.test)])
    assert taken.dtype == torch.float32
    assert sorted(taken.flatten(1).tolist()) == sorted(images.astype("float32").reshape(10, -1).tolist())


def test_without_is_test_a_fifth_of_each_class_is_for_testing(tmp_path: Path) -> None:
    source = saved(tmp_path, images=pixels(100, 4, 4), labels=np.arange(100) % 4, classes=np.array(list("abcd")))
    first, again = load(source), load(source)
    assert first.test.labels.bincount().tolist() == [5] * 4
    assert first.train.labels.bincount().tolist() == [20] * 4
    rows = torch.arange(20)
    assert torch.equal(first.test.take(rows), again.test.take(rows))
    assert first.test.classes == ("a", "b", "c", "d")


def jpegs(count: int = 10, mode: str = "RGB", **more: Any) -> dict[str, Any]:
    files = [encoded(picture(number, (8, 6), mode), "JPEG") for number in range(count)]
    ends = np.cumsum([0, *map(len, files)])
    arrays = {"jpeg": np.frombuffer(b"".join(files), np.uint8), "offset": ends, "label": LABELS[:count]}
    return {**arrays, "is_test": np.arange(count) % 5 == 4, "classes": np.array([b"cat", b"dog"]), **more}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("with_end", [True, False])
def test_jpeg_files(tmp_path: Path, mode: str, with_end: bool) -> None:
    arrays = jpegs(mode=mode)
    offset = arrays["offset"]
    data = load(saved(tmp_path, **{**arrays, "offset": offset if with_end else offset[:-1]}))
    assert (data.train.shape, len(data.train), len(data.test)) == ((3, 6, 8), 8, 2)
    assert (data.train.classes, data.train.mirrored) == (("cat", "dog"), True)
    content = arrays["jpeg"].tobytes()
    with Image.open(io.BytesIO(content[offset[4] : offset[5]])) as image:
        expected = np.asarray(image.convert("RGB"))
    taken = (data.test.take(torch.tensor([0]))[0] * 255).round().byte()
    assert np.array_equal(taken.permute(1, 2, 0).numpy(), expected)


def test_jpeg_files_without_is_test_and_classes(tmp_path: Path) -> None:
    arrays = {name: array for name, array in jpegs().items() if name not in ("is_test", "classes")}
    data = load(saved(tmp_path, **arrays))
    assert (len(data.train), sorted(data.test.labels.tolist()), data.test.classes) == (8, [0, 1], ("0", "1"))


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"images": None}, r"holds labels; an archive holds x_train, y_train, x_test and y_test; or"),
    ({"images": None, "labels": None}, r"holds nothing of use; an archive holds"),
    ({"images": pixels(10, 4, 4).astype("int32")}, r"images is int32; images are uint8, or floats from 0 to 1"),
    ({"images": pixels(10, 16)}, r"images has the shape \[10, 16\]; images are \[N, H, W\]"),
    ({"images": pixels(0, 4, 4)}, r"images has the shape \[0, 4, 4\]"),
    ({"images": pixels(10, 5, 4, 2)}, r"\[10, 5, 4, 2\]; one of the second and the last axis must be 1 or 3"),
    ({"images": pixels(10, 3, 4, 3)}, r"\[10, 3, 4, 3\]; one of the second and the last axis must be 1 or 3"),
    ({"images": pixels(10, 4, 4).astype("float32")}, r"images has values from \d+ to \d+; floats are from 0 to 1"),
    ({"images": np.full((10, 4, 4), -0.5)}, r"images has values from -0.5 to -0.5"),
    ({"images": np.where(np.eye(4), np.nan, np.ones((10, 4, 4)))}, r"images has values from nan to nan"),
    ({"images": pixels(9, 4, 4)}, r"images has 9 images, labels 10 labels; one each is needed"),
    ({"labels": LABELS.astype(float)}, r"labels is float64; labels are whole numbers from 0"),
    ({"labels": LABELS - 1}, r"labels has the label -1; labels are whole numbers from 0"),
    ({"labels": np.eye(10, dtype=int)}, r"labels has the shape \[10, 10\]; labels are \[N\] or \[N, 1\]"),
    ({"labels": LABELS * 0}, r"has one class only; there must be two at least"),
    ({"labels": LABELS + 1}, r"class 0 \('0'\) has no training image; every class needs one"),
    ({"labels": LABELS * 10**6}, r"has the label 1000000; labels count the classes from 0"),
    ({"labels": np.eye(10, dtype=int)[0]}, r"some.npz: class '1' has one image: a split needs at least two"),
    ({"classes": np.array(["a"])}, r"has the label 1, but only 1 classes, from 0"),
    ({"classes": np.arange(2)}, r"classes is int64 \[2\]; it is one text per class"),
    ({"is_test": np.zeros(9)}, r"is_test is float64 \[9\]; it is 0 or 1 for each of the 10 images"),
    ({"is_test": np.full(10, 2)}, r"is_test is int64 \[10\]; it is 0 or 1"),
    ({"is_test": np.zeros(10, bool)}, r"is_test is 0 everywhere; there must be images on both sides"),
    ({"is_test": np.ones(10, bool)}, r"is_test is 1 everywhere; there must be images on both sides"),
    ({"images": np.array([None] * 10)}, r"cannot be read as an .npz archive without pickled objects: Object arrays"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN)
def test_arrays_that_cannot_be_used(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    arrays = {"images": pixels(10, 4, 4), "labels": LABELS, **changes}
    source = saved(tmp_path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(DataError, match=message) as raised:
        load(source)
    assert source in str(raised.value)


def test_sides_must_agree(tmp_path: Path) -> None:
    arrays = {"x_train": pixels(10, 4, 4), "y_train": LABELS, "x_test": pixels(10, 4, 5), "y_test": LABELS}
    with pytest.raises(
        DataError, match=r"x_train and x_test have images of different shapes, \[1, 4, 4\] and \[1, 4, 5\]"
    ):
        load(saved(tmp_path, **arrays))
    arrays |= {"x_test": pixels(10, 4, 4), "y_test": LABELS * 2}
    with pytest.raises(DataError, match=r"class 2 \('2'\) has no training image"):
        load(saved(tmp_path, **arrays))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jpeg": pixels(2, 5)}, r"jpeg is uint8 \[2, 5\]; it is uint8, all files one after the other"),
        ({"offset": np.arange(5)}, r"offset is int64 \[5\]; it is whole numbers, \[10\] or \[11\] for 10 labels"),
        ({"offset": np.arange(10.0)}, r"offset is float64"),
        ({"offset": np.arange(10)[::-1]}, r"offset has image 0 from byte 9 to 8; offsets rise, from 0"),
        ({"offset": np.arange(11) * 10**6}, r"offset has image 0 from byte 0 to 1000000; offsets rise"),
        ({"offset": np.arange(11) - 1}, r"offset has image 0 from byte -1 to 0"),
        ({"offset": np.arange(11) + 1}, r"image 0 in jpeg cannot be used: cannot identify image file"),
    ],
)
def test_jpeg_files_that_cannot_be_used(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(saved(tmp_path, **jpegs(**changes)))


def test_jpeg_files_of_different_sizes_and_damaged_ones(tmp_path: Path) -> None:
    files = [encoded(picture(0, (8, 8)), "JPEG"), encoded(picture(1, (9, 8)), "JPEG")]
    for second, message in ((files[1], "it has 8 x 9 pixels, not 8 x 8"), (files[0][:-300], "Truncated")):
        content = files[0] + second
        arrays = {"jpeg": np.frombuffer(content, np.uint8), "offset": np.array([0, len(files[0])]), "label": LABELS[:2]}
        with pytest.raises(DataError, match=f"image 1 in jpeg cannot be used: .*{message}"):
            load(saved(tmp_path, **arrays))


def test_archives_that_are_none(tmp_path: Path) -> None:
    source = saved(tmp_path, images=pixels(10, 4, 4), labels=LABELS)
    whole = Path(source).read_bytes()
    np.save(tmp_path / "array.npy", pixels(4, 4))
    for content in (b"", b"text", whole[: len(whole) // 2], (tmp_path / "array.npy").read_bytes()):
        Path(source).write_bytes(content)
        with pytest.raises(DataError, match=r"some.npz cannot be read as an .npz archive"):
            load(source)
    damaged = bytearray(whole)
    damaged[100:140] = bytes(40)
    Path(source).write_bytes(damaged)
    with pytest.raises(DataError, match=r"some.npz cannot be read as an .npz archive"):
        load(source)


def test_image_size_is_not_for_archives(tmp_path: Path) -> None:
    source = saved(tmp_path, images=pixels(10, 4, 6), labels=LABELS)
    with pytest.raises(DataError, match=r"some.npz has images of 4 x 6, image_size is 6: it applies to folders"):
        load(source, image_size=6)


@pytest.mark.parametrize(("module", "name"), [("numpy", "numpy"), ("PIL.Image", "PIL")])
def test_missing_extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    source = saved(tmp_path, **jpegs())
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"^{name} cannot be imported"):
        load(source)
