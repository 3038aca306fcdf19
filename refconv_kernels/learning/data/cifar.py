"""CIFAR-10 and CIFAR-100 as they are distributed, in the binary and in the Python version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from refconv_kernels.learning.data.images import Data, MemoryImages
from refconv_kernels.learning.data.inert_pickle import as_bytes_array, read_pickle
from refconv_kernels.learning.errors import DataError

__all__ = ["find_cifar", "load_cifar"]

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Version:
    """One way in which one of the two is distributed."""

    name: str
    classes: int
    train: tuple[str, ...]
    test: str
    names: str  # the file with the names of the classes
    label_bytes: int  # before each image, the last is the label; 0 for the Python version
    keys: tuple[str, str] = ("", "")  # Python version: of the labels, and of the names of the classes


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_VERSIONS = (
    _Version("CIFAR-10", 10, tuple(f"{name}.bin" for name in _BATCHES), "test_batch.bin", "batches.meta.txt", 1),
    _Version("CIFAR-100", 100, ("train.bin",), "test.bin", "fine_label_names.txt", 2),
    _Version("CIFAR-10", 10, _BATCHES, "test_batch", "batches.meta", 0, ("labels", "label_names")),
    _Version("CIFAR-100", 100, ("train",), "test", "meta", 0, ("fine_labels", "fine_label_names")),
)


def find_cifar(path: Path) -> Path | None:
    """The folder of CIFAR files that ``path`` is or contains, or None.

    Raises:
        DataError: it contains several.
    """
    if _version(path) is not None:
        return path
    inside = sorted(entry for entry in path.iterdir() if entry.is_dir() and _version(entry) is not None)
    if len(inside) > 1:
        raise DataError(f"{path} has several folders of CIFAR files, {', '.join(map(str, inside))}: name one of them")
    return inside[0] if inside else None


def load_cifar(path: Path) -> Data:
    """CIFAR-10 or CIFAR-100 (its fine labels), ``[N, 3, 32, 32]`` in memory.

    Args:
        path: a folder with ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``; ``train.bin`` and
            ``test.bin``; or the same without ``.bin`` in the Python version, whose pickles are read as data: nothing
            in them is executed.

    Raises:
        DataError: a file is missing, has a wrong length, or holds something else.
    """
    version = _version(path)
    if version is None:
        raise DataError(f"{path} has no files of CIFAR-10 or CIFAR-100")
    classes = _classes(path, version)
    train, test = (
        MemoryImages(images, labels, classes, mirrored=True)
        for images, labels in (_read(path, version, version.train), _read(path, version, (version.test,)))
    )
    return Data(version.name, train, test)


def _version(path: Path) -> _Version | None:
    """The version of which ``path`` has a file of images."""
    versions = (v for v in _VERSIONS if any((path / name).is_file() for name in (*v.train, v.test)))
    return next(versions, None)


def _read(path: Path, version: _Version, files: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Images ``[N, 3, 32, 32]``, uint8, and labels ``[N]``, int64, of ``files``."""
    missing = [name for name in files if not (path / name).is_file()]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)} of {version.name}")
    read = _binary if version.label_bytes else _python
    parts = [read(path / name, version) for name in files]
    return torch.cat([pixels for pixels, _ in parts]).view(-1, 3, 32, 32), torch.cat([labels for _, labels in parts])


def _binary(file: Path, version: _Version) -> tuple[Tensor, Tensor]:
    content = bytearray(file.read_bytes())
    record = version.label_bytes + _PIXELS
    if not content or len(content) % record:
        rule = f"an image of {version.name} takes {record}, and there is at least one"
        raise DataError(f"{file} has {len(content)} bytes; {rule}")
    records = torch.frombuffer(content, dtype=torch.uint8).view(-1, record)
    labels = records[:, version.label_bytes - 1].tolist()  # of CIFAR-100's two the fine one
    return records[:, version.label_bytes :], _labels(file, version, labels)


def _python(file: Path, version: _Version) -> tuple[Tensor, Tensor]:
    content = read_pickle(file)
    key = version.keys[0]
    if not isinstance(content, dict) or "data" not in content or key not in content:
        raise DataError(f"{file} must hold a dictionary with data and {key}")
    pixels, labels = as_bytes_array(content["data"]), content[key]
    if pixels is None or pixels.ndim != 2 or pixels.shape[1] != _PIXELS or not len(pixels):
        found = "no array of bytes" if pixels is None else f"{list(pixels.shape)}"
        raise DataError(f"{file}: data is {found}; it is uint8, [N, {_PIXELS}]")
    if not isinstance(labels, list) or len(labels) != len(pixels) or any(type(label) is not int for label in labels):
        raise DataError(f"{file}: {key} must be a list of whole numbers, one for each of the {len(pixels)} images")
    return pixels, _labels(file, version, labels)


def _labels(file: Path, version: _Version, labels: list[int]) -> Tensor:
    for label in labels:
        if not 0 <= label < version.classes:
            raise DataError(f"{file} has the label {label}; those of {version.name} are 0 to {version.classes - 1}")
    return torch.tensor(labels, dtype=torch.int64)


def _classes(path: Path, version: _Version) -> tuple[str, ...]:
    """The names of the classes, where there are any: numbers."""
    file = path / version.names
    if not file.is_file():
        return tuple(str(number) for number in range(version.classes))
    names: object
    if version.label_bytes:
        names = file.read_text("utf-8", "replace").split()
    else:
        content = read_pickle(file)
        names = content.get(version.keys[1]) if isinstance(content, dict) else None
    if not isinstance(names, list) or len(names) != version.classes or not all(isinstance(name, str) for name in names):
        raise DataError(f"{file} must hold the names of the {version.classes} classes of {version.name}")
    return tuple(names)
