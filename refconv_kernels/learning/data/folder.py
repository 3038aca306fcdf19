"""Folders of image files: one folder per class."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from refconv_kernels.learning.data import decoding
from refconv_kernels.learning.data.files import FolderImages
from refconv_kernels.learning.data.images import Data
from refconv_kernels.learning.data.split import TEST_SHARE, split_rows
from refconv_kernels.learning.errors import DataError, MissingExtra

__all__ = ["MEMORY_LIMIT", "load_folder"]

#: Bytes up to which decoded images are kept.
MEMORY_LIMIT = 2 << 30
_DEFAULT_SIZE = 224
_LARGEST_OWN_SIZE = 64
_RULE = "the images are in one folder per class, in train/ and test/ (or val/), or directly"


@dataclass(frozen=True)
class _Found:
    """Files whose headers are those of images."""

    files: list[Path]
    labels: list[int]
    sizes: list[tuple[int, int]]  # height and width


def load_folder(path: Path, image_size: int | None = None) -> Data:
    """Image files in ``train/<class>/`` and ``test/<class>/`` (or ``val/<class>/``), or in ``<class>/``.

    Class folders may have folders of their own. JPEG, PNG, BMP and WebP files are images, whatever their names;
    others, and damaged ones, are left out and reported in ``skipped``. Hidden files are passed over.

    Images are kept in memory if 2 GiB hold all of them. Otherwise they are decoded when they are taken, and only
    their headers are looked at here: a file that is damaged further on is an error then.

    Args:
        path: the folder.
        image_size: height and width of the images; None takes 224, or the images' own size if all have one and
            neither side is above 64.

    Returns:
        The data. Without ``test/`` and ``val/``, a fifth of each class is for testing.

    Raises:
        DataError: no class folders, a class folder without an image, other classes in ``test/`` than in
            ``train/``, or fewer than two classes.
        MissingExtra: Pillow is not installed.
    """
    skipped: list[str] = []
    with decoding.quiet():
        parts = _parts(path)
        classes = _classes(parts)
        found = [_scan(part, classes, skipped) for part in parts]
        sizes = {size for part in found for size in part.sizes}
        if image_size is not None:
            size = (image_size, image_size)
        elif len(sizes) == 1 and max(max(sizes)) <= _LARGEST_OWN_SIZE:
            (size,) = sizes
        else:
            size = (_DEFAULT_SIZE, _DEFAULT_SIZE)
        threads = max(height * width for height, width in sizes) >= decoding.SMALL
        keep = 3 * size[0] * size[1] * sum(len(part.files) for part in found) <= MEMORY_LIMIT
        sets = [_images(part, classes, size, keep, threads, skipped) for part in found]
    for part, images in zip(parts, sets, strict=True):
        _check_classes(part, classes, images.labels.tolist(), skipped)
    if len(sets) == 1:
        try:
            rows = split_rows(sets[0].labels, classes, TEST_SHARE)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        sets = [sets[0].subset(some) for some in rows]
    train, test = sets
    return Data(path.resolve().name, train, test, tuple(skipped))


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _parts(path: Path) -> list[Path]:
    """The folders that hold class folders: of the training and of the test images, or of all."""
    names = {folder.name for folder in _folders(path)}
    if not names:
        files = sum(1 for _ in path.iterdir())
        raise DataError(f"{path} has {files or 'no'} files and no folders; {_RULE}")
    if "train" not in names:
        return [path]
    test = [name for name in ("test", "val") if name in names]
    if not test:
        raise DataError(f"{path} has train/, but neither test/ nor val/; {_RULE}")
    # Where there are both, the test images are often without classes, for a competition.
    chosen = next((name for name in test if _folders(path / name)), test[0])
    return [path / "train", path / chosen]


def _classes(parts: list[Path]) -> tuple[str, ...]:
    names = [tuple(folder.name for folder in _folders(part)) for part in parts]
    first, last = set(names[0]), set(names[-1])
    if first != last:
        differences = [
            f"{', '.join(sorted(more)[:5])} only in {part}"
            for part, more in ((parts[0], first - last), (parts[-1], last - first))
            if more
        ]
        raise DataError(f"training and test images have different classes: {'; '.join(differences)}")
    if len(first) < 2:
        found = f"one class only, {names[0][0]!r}" if first else "no class folders"
        raise DataError(f"{parts[0]} has {found}; there must be two at least to tell apart")
    return names[0]


def _scan(part: Path, classes: tuple[str, ...], skipped: list[str]) -> _Found:
    """The images among the files, by their headers."""
    skipped += [f"{file}: not in a class folder" for file in _files(part, part.iterdir())]
    files: list[tuple[int, Path]] = []
    for label, name in enumerate(classes):
        files += [(label, file) for file in _files(part, (part / name).rglob("*"))]
    found = _Found([], [], [])
    sizes = decoding.in_threads(_size_or_reason, [file for _, file in files])
    for (label, file), size in zip(files, sizes, strict=True):
        if isinstance(size, str):
            skipped.append(f"{file}: {size}")
        else:
            found.files.append(file)
            found.labels.append(label)
            found.sizes.append(size)
    _check_classes(part, classes, found.labels, skipped)
    return found


def _files(part: Path, entries: Iterable[Path]) -> list[Path]:
    """The files of ``entries`` that are not hidden, in an order that no file system decides."""
    shown = [file for file in entries if not any(name.startswith(".") for name in file.relative_to(part).parts)]
    return sorted(file for file in shown if not file.is_dir())


def _size_or_reason(file: Path) -> tuple[int, int] | str:
    try:
        return decoding.size_of(file)
    except MissingExtra:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything for a damaged file
        return decoding.reason(error)


def _images(
    found: _Found, classes: tuple[str, ...], size: tuple[int, int], keep: bool, threads: bool, skipped: list[str]
) -> FolderImages:
    """The images as a set; decoded, and without those that cannot be, if they are to be kept."""
    labels = torch.tensor(found.labels)
    if not keep:
        return FolderImages(found.files, labels, classes, size, threads=threads)
    pixels, failed = decoding.decode_all(found.files, size, threads=threads)
    skipped += [f"{found.files[number]}: {why}" for number, why in failed.items()]
    images = FolderImages(found.files, labels, classes, size, pixels=pixels, threads=threads)
    return images.subset(torch.tensor([row for row in range(len(labels)) if row not in failed], dtype=torch.int64))


def _check_classes(part: Path, classes: tuple[str, ...], labels: list[int], skipped: list[str]) -> None:
    """Every class must have an image."""
    present = set(labels)
    for label, name in enumerate(classes):
        if label not in present:
            folder = part / name
            reasons = [line for line in skipped if line.startswith(f"{folder}{os.sep}")]
            found = f": {'; '.join(reasons[:3])}" if reasons else ""
            raise DataError(f"{folder} has no readable image; every class needs one{found}")
