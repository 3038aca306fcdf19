"""Folders of image files: layouts, sizes, modes, damage, and the two ways of keeping them."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refconv_kernels.learning.data import FolderImages, folder, hold_out, load, statistics
from refconv_kernels.learning.errors import DataError, MissingExtra

from .files import encoded, fill, picture


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@pytest.fixture(params=[True, False], ids=["kept", "lazy"])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(folder, "MEMORY_LIMIT", 0)
    return request.param


def train_and(root: Path, test: str, size: tuple[int, int] = (8, 8)) -> str:
    for side, (name, label) in enumerate((part, label) for part in ("train", test) for label in ("cat", "dog")):
        fill(root / name / label, 4 if name == "train" else 2, size, seed=side)
    return str(root)


@pytest.mark.parametrize("test", ["test", "val"])
def test_train_and_test_folders(tmp_path: Path, kept: bool, test: str) -> None:
    data = load(train_and(tmp_path / "pets", test))
    assert (data.name, data.skipped, data.train.classes, data.test.classes) == (
        "pets",
        (),
        ("cat", "dog"),
        ("cat", "dog"),
    )
    assert (data.train.shape, data.train.mirrored, len(data.train), len(data.test)) == ((3, 8, 8), True, 8, 4)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4
    assert isinstance(data.train, FolderImages)
    assert data.train.in_memory == kept
    expected = torch.stack([as_tensor(picture(1000)), as_tensor(picture(2))])
    assert torch.equal(data.train.take(torch.tensor([4, 2])), expected)
    part = data.train.subset(torch.tensor([6, 4])).subset(torch.tensor([1]))
    assert torch.equal(part.take(torch.tensor([0])), expected[:1])
    assert part.labels.tolist() == [1]
    assert [len(side) for side in hold_out(data.train, 0.25)] == [6, 2]
    assert len(statistics(data.train)[0]) == 3
    assert data.train.take(torch.tensor([], dtype=torch.int64)).shape == (0, 3, 8, 8)


def test_of_test_and_val_the_one_with_classes(tmp_path: Path) -> None:
    source = train_and(tmp_path, "val")
    fill(tmp_path / "test", 3)
    assert len(load(source).test) == 4
    train_and(tmp_path, "test")
    fill(tmp_path / "test" / "cat", 9)
    assert len(load(source).test) == 11


def test_class_folders_alone_are_split(tmp_path: Path, kept: bool) -> None:
    for number, name in enumerate(("b", "a", ".hidden")):
        fill(tmp_path / name / "deeper", 10, seed=number)
    first, again = load(str(tmp_path)), load(str(tmp_path))
    assert first.train.classes == ("a", "b")
    assert first.train.labels.bincount().tolist() == [8, 8]
    assert first.test.labels.bincount().tolist() == [2, 2]
    assert isinstance(first.test, FolderImages)
    assert isinstance(again.test, FolderImages)
    assert first.test.files == again.test.files
    assert torch.equal(first.test.take(torch.arange(4)), again.test.take(torch.arange(4)))


def test_take_from_many_threads_at_once(tmp_path: Path, kept: bool) -> None:
    images = load(train_and(tmp_path, "test"), image_size=100).train
    expected = images.take(torch.arange(8))
    rows = [torch.randperm(8) for _ in range(20)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(images.take, rows))
    assert all(torch.equal(result, expected[r]) for result, r in zip(results, rows, strict=True))


@pytest.mark.parametrize(
    ("sizes", "asked", "shape"),
    [
        ([(8, 8)], None, (3, 8, 8)),
        ([(64, 48)], None, (3, 48, 64)),
        ([(8, 8), (8, 9)], None, (3, 224, 224)),
        ([(65, 65)], None, (3, 224, 224)),
        ([(8, 8)], 20, (3, 20, 20)),
    ],
)
def test_sizes(tmp_path: Path, sizes: list[tuple[int, int]], asked: int | None, shape: tuple[int, ...]) -> None:
    train_and(tmp_path, "test", sizes[0])
    picture(0, sizes[-1]).save(tmp_path / "train" / "cat" / "00.png")
    assert load(str(tmp_path), image_size=asked).test.shape == shape


def test_shorter_side_is_resized_and_the_centre_kept(tmp_path: Path) -> None:
    # Left red, centre blue, right green: a square of the centre is all blue.
    image = Image.new("RGB", (64, 16), "red")
    image.paste("blue", (16, 0, 48, 16))
    image.paste("lime", (48, 0, 64, 16))
    fill(tmp_path / "other", 2)
    (tmp_path / "wide").mkdir()
    for name in ("a.png", "b.png"):
        image.save(tmp_path / "wide" / name)
    data = load(str(tmp_path), image_size=8)
    (wide,) = data.train.take((data.train.labels == 1).nonzero().flatten())
    assert torch.equal(wide, torch.tensor([0.0, 0, 1])[:, None, None].expand(3, 8, 8))


def test_resizing_is_antialiased(tmp_path: Path) -> None:
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32)))  # one pixel wide
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            stripes.save(tmp_path / name / f"{number}.png")
    taken = load(str(tmp_path), image_size=16).train.take(torch.tensor([0]))
    assert (taken - 0.5).abs().max() < 0.05


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_modes(tmp_path: Path, mode: str) -> None:
    fill(tmp_path / "a", 2)
    (tmp_path / "b").mkdir()
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    for number in range(2):
        if mode == "I;16":
            Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "b" / f"{number}.png")
        elif mode == "P":
            palette = Image.fromarray(grey).convert("P")
            palette.save(tmp_path / "b" / f"{number}.png", transparency=bytes(range(256)))
        else:
            kind = "jpg" if mode == "CMYK" else "png"
            Image.fromarray(grey).convert("RGB").convert(mode).save(tmp_path / "b" / f"{number}.{kind}")
    data = load(str(tmp_path))
    assert data.skipped == ()
    (taken,) = data.train.take((data.train.labels == 1).nonzero().flatten())
    assert taken.shape == (3, 8, 8)
    tolerance = {"CMYK": 0.1, "1": 1.0}.get(mode, 0.005)
    assert (taken - torch.from_numpy(grey) / 255).abs().max() <= tolerance


@pytest.mark.parametrize("kind", ["jpeg", "png", "bmp", "webp"])
def test_kinds_of_files(tmp_path: Path, kind: str) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            picture(number).save(tmp_path / name / f"{number}.{kind}")
    data = load(str(tmp_path))
    assert (len(data.train), len(data.test), data.skipped) == (2, 2, ())


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    fill(tmp_path / "a", 2)
    (tmp_path / "b").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by half
    for number in range(2):
        picture(7).save(tmp_path / "b" / f"{number}.png", exif=exif)
    data = load(str(tmp_path))
    (taken,) = data.train.take((data.train.labels == 1).nonzero().flatten())
    assert torch.equal(taken, as_tensor(picture(7)).flip(1, 2))


def damage(root: Path) -> None:
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "cat" / ".DS_Store").write_text("hidden")
    (root / "train" / "cat" / "empty.png").touch()
    (root / "train" / "cat" / "dangling.png").symlink_to(root / "nowhere")
    (root / "train" / "readme.md").touch()
    (root / "test" / "dog" / "cut.jpg").write_bytes(encoded(picture(0, (64, 64)), "JPEG")[:-2000])


def test_files_that_are_no_images_are_left_out_with_the_reason(tmp_path: Path) -> None:
    source = train_and(tmp_path, "test")
    damage(tmp_path)
    data = load(source, image_size=8)
    assert (len(data.train), len(data.test)) == (8, 4)
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    skipped = [line.removeprefix(f"{tmp_path}/") for line in data.skipped]
    assert [line.partition(":")[0] for line in skipped] == [
        "train/readme.md",
        "train/cat/dangling.png",
        "train/cat/empty.png",
        "train/cat/notes.txt",
        "test/dog/cut.jpg",
    ]
    for line, reason in zip(
        skipped, ("not in a class", "No such file", "cannot identify", "cannot identify", "truncated"), strict=True
    ):
        assert reason in line
        assert "\n" not in line
    assert torch.equal(
        data.test.take(torch.arange(4)), load(train_and(tmp_path / "clean", "test")).test.take(torch.arange(4))
    )


def test_a_file_that_fails_when_taken_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "MEMORY_LIMIT", 0)
    source = train_and(tmp_path, "test")
    damage(tmp_path)
    data = load(source, image_size=8)
    assert len(data.skipped) == 4
    assert (len(data.train), len(data.test)) == (8, 5)
    with pytest.raises(DataError, match=r"dog/cut.jpg cannot be read: .*truncated"):
        data.test.take(torch.arange(5))
    (tmp_path / "train" / "cat" / "02.png").unlink()
    with pytest.raises(DataError, match=r"cat/02.png cannot be read: .*No such file"):
        data.train.take(torch.arange(8))
    assert data.train.take(torch.tensor([0])).shape == (1, 3, 8, 8)


def test_images_of_too_many_pixels_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = train_and(tmp_path, "test")
    picture(0, (20, 15)).save(tmp_path / "train" / "cat" / "large.png")  # would be a warning
    picture(0, (40, 30)).save(tmp_path / "train" / "cat" / "larger.png")  # would be an error
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    large, larger = load(source).skipped
    assert large.endswith("large.png: its 20 x 15 pixels are more than Pillow's limit, 200")
    assert "larger.png: Image size (1200 pixels) exceeds limit" in larger


def test_folders_without_the_layout(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no files and no folders; the images are in one folder per class"):
        load(str(tmp_path))
    fill(tmp_path, 3)
    with pytest.raises(DataError, match=r"has 3 files and no folders; the images are in one folder per class"):
        load(str(tmp_path))
    fill(tmp_path / "cat", 3)
    with pytest.raises(DataError, match=r"has one class only, 'cat'; there must be two at least"):
        load(str(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"has train/, but neither test/ nor val/; the images are in"):
        load(str(tmp_path))
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match=r"train has no class folders; there must be two at least"):
        load(str(tmp_path))


def test_classes_must_be_the_same_on_both_sides(tmp_path: Path) -> None:
    source = train_and(tmp_path, "val")
    fill(tmp_path / "val" / "bird", 1)
    (tmp_path / "train" / "dog").rename(tmp_path / "train" / "fox")
    with pytest.raises(DataError, match=r"have different classes: fox only in .*train; bird, dog only in .*val$"):
        load(source)


def test_class_without_an_image(tmp_path: Path) -> None:
    source = train_and(tmp_path, "test")
    for file in (tmp_path / "test" / "dog").iterdir():
        file.write_bytes(b"damaged")
    with pytest.raises(
        DataError, match=r"test/dog has no readable image; every class needs one: .*00.png: cannot identify"
    ):
        load(source)
    damage(tmp_path)  # with a header, at least
    with pytest.raises(DataError, match=r"test/dog has no readable image; .*truncated"):
        load(source)
    shutil.rmtree(tmp_path / "train" / "cat")
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(DataError, match=r"train/cat has no readable image; every class needs one$"):
        load(source)


def test_class_with_one_image_cannot_be_split(tmp_path: Path) -> None:
    fill(tmp_path / "a", 2)
    fill(tmp_path / "b", 1)
    with pytest.raises(DataError, match=rf"^{tmp_path}: class 'b' has one image"):
        load(str(tmp_path))


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = train_and(tmp_path, "test")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingExtra, match=r"^PIL cannot be imported"):
        load(source)
