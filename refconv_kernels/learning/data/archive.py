"""Images from an ``.npz`` archive: arrays of pixels, or JPEG files one after the other in one array."""

from __future__ import annotations

import io
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refconv_kernels.learning.data.decoding import SMALL, decode_all, quiet, reason, size_of
from refconv_kernels.learning.data.images import Data, MemoryImages
from refconv_kernels.learning.data.split import TEST_SHARE, split_rows
from refconv_kernels.learning.errors import DataError, MissingExtra, require

__all__ = ["load_archive"]

_SPLIT = (("x_train", "y_train", "x_test", "y_test"), ("train_images", "train_labels", "test_images", "test_labels"))
_KNOWN = {"images", "labels", "jpeg", "offset", "label", "is_test", "classes"}.union(*_SPLIT)
_RULE = (
    "an archive holds x_train, y_train, x_test and y_test; or train_images, train_labels, test_images and "
    "test_labels; or images and labels; or jpeg, offset and label"
)


def load_archive(path: Path) -> Data:
    """The images of an ``.npz`` archive, in memory.

    It holds one of these, and besides the names of the classes in ``classes`` if it has any:

    - ``x_train``, ``y_train``, ``x_test``, ``y_test``; or ``train_images``, ``train_labels``, ``test_images``,
      ``test_labels``;
    - ``images``, ``labels`` and, ``[N]``, ``is_test``; without it a fifth of each class is for testing;
    - ``jpeg`` (uint8, all files one after the other), ``offset`` (``[N]``, the first byte of each; or
      ``[N + 1]``, with the end of the last), ``label`` and ``is_test`` as above; all of one size.

    Images are ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]`` with 1, 3 or 4 channels, uint8, or floats
    from 0 to 1; labels are whole numbers, ``[N]`` or ``[N, 1]``, from 0.

    Returns:
        The data. Colour images count as ``mirrored``, grey ones may be digits and do not.

    Raises:
        DataError: the archive cannot be read, or what it holds is something else.
        MissingExtra: NumPy or, for JPEG files, Pillow is not installed.
    """
    arrays = _read(path)
    split = next((names for names in _SPLIT if all(name in arrays for name in names)), None)
    if split is not None:
        sides = [_labelled(path, arrays, *split[:2]), _labelled(path, arrays, *split[2:])]
        if sides[0][0].shape[1:] != sides[1][0].shape[1:]:
            shapes = " and ".join(str(list(images.shape[1:])) for images, _ in sides)
            raise DataError(f"{path}: {split[0]} and {split[2]} have images of different shapes, {shapes} (C, H, W)")
    elif "images" in arrays and "labels" in arrays:
        sides = [_labelled(path, arrays, "images", "labels")]
    elif "jpeg" in arrays and "offset" in arrays and "label" in arrays:
        labels = _labels(path, "label", arrays["label"])
        sides = [(_decoded(path, arrays["jpeg"], arrays["offset"], len(labels)), labels)]
    else:
        raise DataError(f"{path} holds {', '.join(sorted(arrays)) or 'nothing of use'}; {_RULE}")

    highest = max(int(labels.max()) for _, labels in sides)
    classes = _classes(path, arrays.get("classes"), highest)
    mirrored = sides[0][0].shape[1] > 1
    parts = [MemoryImages(images, labels, classes, mirrored=mirrored) for images, labels in sides]
    if len(parts) == 1:
        (every,) = parts
        parts = [every.subset(rows) for rows in _sides(path, arrays.get("is_test"), every)]
    train, test = parts
    present = train.labels.bincount(minlength=len(classes))
    if not present.all():
        missing = int((present == 0).nonzero()[0])
        raise DataError(f"{path}: class {missing} ({classes[missing]!r}) has no training image; every class needs one")
    return Data(path.stem, train, test)


def _read(path: Path) -> dict[str, Any]:
    """The arrays that are known by their names."""
    numpy = require("numpy")
    try:
        with path.open("rb") as file:  # NumPy leaves what it opens itself open where it fails
            if not zipfile.is_zipfile(file):
                raise ValueError("it is no zip archive, or not all of one")
            file.seek(0)
            with numpy.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files if name in _KNOWN}
    except Exception as error:  # of the file system, zipfile, zlib and NumPy
        raise DataError(f"{path} cannot be read as an .npz archive without pickled objects: {reason(error)}") from error


def _labelled(path: Path, arrays: dict[str, Any], images: str, labels: str) -> tuple[Tensor, Tensor]:
    pixels, numbers = _images(path, images, arrays[images]), _labels(path, labels, arrays[labels])
    if len(pixels) != len(numbers):
        raise DataError(
            f"{path}: {images} has {len(pixels)} images, {labels} {len(numbers)} labels; one each is needed"
        )
    return pixels, numbers


def _images(path: Path, name: str, array: Any) -> Tensor:
    """``array`` as ``[N, C, H, W]``, uint8 or float32."""
    numpy = require("numpy")
    shape, where = list(array.shape), f"{path}: {name}"
    if array.dtype != numpy.uint8 and array.dtype.kind != "f":
        raise DataError(f"{where} is {array.dtype}; images are uint8, or floats from 0 to 1")
    if array.ndim not in (3, 4) or 0 in shape:
        raise DataError(f"{where} has the shape {shape}; images are [N, H, W], [N, H, W, C] or [N, C, H, W]")
    if array.ndim == 3:
        array = array[:, None]
    else:
        axes = [axis for axis in (1, 3) if shape[axis] in (1, 3)] or [axis for axis in (1, 3) if shape[axis] == 4]
        if len(axes) != 1:
            raise DataError(
                f"{where} has the shape {shape}; one of the second and the last axis must be 1 or 3 (or 4) channels"
            )
        array = array.transpose(0, 3, 1, 2) if axes == [3] else array
    if array.dtype.kind == "f":
        array = array.astype(numpy.float32)  # also of the machine's byte order
        low, high = array.min(), array.max()  # NaN if there is one
        if not (low >= 0 and high <= 1):
            raise DataError(f"{where} has values from {low:g} to {high:g}; floats are from 0 to 1 (bytes are uint8)")
    return torch.from_numpy(numpy.ascontiguousarray(array))


def _labels(path: Path, name: str, array: Any) -> Tensor:
    where = f"{path}: {name}"
    if array.dtype.kind not in "iu":
        raise DataError(f"{where} is {array.dtype}; labels are whole numbers from 0")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or not array.size:
        raise DataError(f"{where} has the shape {list(array.shape)}; labels are [N] or [N, 1]")
    labels = torch.from_numpy(array.astype(require("numpy").int64))
    if labels.min() < 0:
        raise DataError(f"{where} has the label {int(labels.min())}; labels are whole numbers from 0")
    return labels


def _classes(path: Path, array: Any, highest: int) -> tuple[str, ...]:
    if array is None:
        if highest > 99_999:
            raise DataError(f"{path} has the label {highest}; labels count the classes from 0, and so many are none")
        names = [str(number) for number in range(highest + 1)]
    elif array.ndim != 1 or array.dtype.kind not in "SU":
        raise DataError(f"{path}: classes is {array.dtype} {list(array.shape)}; it is one text per class")
    else:
        names = [name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in array.tolist()]
    if highest >= len(names):
        raise DataError(f"{path} has the label {highest}, but only {len(names)} classes, from 0")
    if len(names) < 2:
        raise DataError(f"{path} has one class only; there must be two at least to tell apart")
    return tuple(names)


def _sides(path: Path, is_test: Any, every: MemoryImages) -> tuple[Tensor, Tensor]:
    """The rows of the training and of the test images."""
    if is_test is None:
        try:
            return split_rows(every.labels, every.classes, TEST_SHARE)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
    if is_test.shape != (len(every),) or is_test.dtype.kind not in "biu" or not ((is_test == 0) | (is_test == 1)).all():
        found = f"{is_test.dtype} {list(is_test.shape)}"
        raise DataError(f"{path}: is_test is {found}; it is 0 or 1 for each of the {len(every)} images")
    mask = torch.from_numpy(is_test.astype(bool))
    if mask.all() or not mask.any():
        raise DataError(f"{path}: is_test is {int(mask[0])} everywhere; there must be images on both sides")
    return (~mask).nonzero().squeeze(1), mask.nonzero().squeeze(1)


def _decoded(path: Path, jpeg: Any, offset: Any, count: int) -> Tensor:
    """The files in ``jpeg`` as ``[N, 3, H, W]``, uint8."""
    numpy = require("numpy")
    if jpeg.dtype != numpy.uint8 or jpeg.ndim != 1:
        raise DataError(f"{path}: jpeg is {jpeg.dtype} {list(jpeg.shape)}; it is uint8, all files one after the other")
    if offset.dtype.kind not in "iu" or offset.shape not in ((count,), (count + 1,)):
        found = f"{offset.dtype} {list(offset.shape)}"
        raise DataError(
            f"{path}: offset is {found}; it is whole numbers, [{count}] or [{count + 1}] for {count} labels"
        )
    ends = [*offset.tolist(), len(jpeg)][: count + 1]
    for number, (start, end) in enumerate(pairwise(ends)):
        if not 0 <= start < end <= len(jpeg):
            found = f"{path}: offset has image {number} from byte {start} to {end}"
            raise DataError(f"{found}; offsets rise, from 0 to {len(jpeg)} at most")
    content = memoryview(jpeg.tobytes())
    files = [io.BytesIO(content[start:end]) for start, end in pairwise(ends)]
    with quiet():
        try:
            size = size_of(files[0])
        except MissingExtra:
            raise
        except Exception as error:  # Pillow's readers raise nearly anything for a damaged file
            failed = {0: reason(error)}
        else:
            files[0].seek(0)
            pixels, failed = decode_all(files, size, fit=False, threads=size[0] * size[1] >= SMALL)
    if failed:
        number = min(failed)
        raise DataError(f"{path}: image {number} in jpeg cannot be used: {failed[number]}")
    return pixels
