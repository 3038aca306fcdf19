"""Image files to pixels, with Pillow, in threads: its decoders let go of Python's lock."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from refconv_kernels.learning.errors import MissingExtra, require

__all__ = ["SMALL", "decode", "decode_all", "in_threads", "quiet", "reason", "size_of"]

_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
#: Pixels of an image from which on it pays to decode in several threads.
SMALL = 96 * 96
_CHUNK = 64  # files per task: small ones take less time than handing them to a thread
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def size_of(file: Path | BinaryIO) -> tuple[int, int]:
    """Height and width of an image, from its header. Raises whatever Pillow raises for what is no image."""
    image_module = require("PIL.Image")
    with image_module.open(file, formats=_FORMATS) as image:
        width, height = image.size
    if image_module.MAX_IMAGE_PIXELS is not None and width * height > image_module.MAX_IMAGE_PIXELS:
        raise ValueError(f"its {width} x {height} pixels are more than Pillow's limit, {image_module.MAX_IMAGE_PIXELS}")
    return height, width


def decode(file: Path | BinaryIO, size: tuple[int, int] | None = None) -> Tensor:
    """The pixels of an image, turned as its EXIF data says.

    Args:
        file: a JPEG, PNG, BMP or WebP file of any mode; transparency is ignored.
        size: height and width to bring it to: resized (antialiased) until it covers them, then cropped to its
            centre. None leaves it as it is.

    Returns:
        ``[3, H, W]``, uint8.

    Raises:
        Exception: nearly any, for files that are damaged or no images.
    """
    image_module, operations = require("PIL.Image"), require("PIL.ImageOps")
    with image_module.open(file, formats=_FORMATS) as image:
        image = _rgb(operations.exif_transpose(image))
    if size is not None:
        image = operations.fit(image, (size[1], size[0]), image_module.Resampling.BILINEAR)
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .view(image.height, image.width, 3)
        .permute(2, 0, 1)
    )


def _rgb(image: Any) -> Any:
    if image.mode.startswith("I"):  # 16-bit greyscale, which Pillow would clip
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if "transparency" in image.info:  # Pillow warns of a direct way from a palette with transparency
        image = image.convert("RGBA")
    return image.convert("RGB")


def decode_all(
    files: Sequence[Path | BinaryIO], size: tuple[int, int], *, fit: bool = True, threads: bool = True
) -> tuple[Tensor, dict[int, str]]:
    """Decode ``files`` to ``[N, 3, H, W]``, uint8.

    Args:
        files: images of any size.
        size: height and width of the result.
        fit: whether to bring other images to ``size``, as :func:`decode` does; otherwise they fail.
        threads: whether to share the work: it does not pay for :data:`SMALL` images, whose decoding is mostly
            Python's own work.

    Returns:
        The pixels, undefined for files that cannot be read, and for each of these its place and the reason.
    """
    pixels = torch.empty((len(files), 3, *size), dtype=torch.uint8)

    def fill(number: int) -> str | None:
        try:
            image = decode(files[number], size if fit else None)
            if image.shape != pixels.shape[1:]:
                raise ValueError(f"it has {image.shape[1]} x {image.shape[2]} pixels, not {size[0]} x {size[1]}")
            pixels[number] = image
        except MissingExtra:
            raise
        except Exception as error:  # Pillow's readers raise nearly anything for a damaged file
            return reason(error)
        return None

    numbers = range(len(files))
    results = in_threads(fill, numbers) if threads else [fill(number) for number in numbers]
    return pixels, {number: result for number, result in enumerate(results) if result is not None}


def reason(error: Exception) -> str:
    """An exception in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def in_threads(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """``function`` of each of ``items``, in their order."""

    def some(start: int) -> list[_Result]:
        return [function(item) for item in items[start : start + chunk]]

    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chunk = max(1, min(_CHUNK, len(items) // (4 * workers)))
    with ThreadPoolExecutor(workers) as pool:
        return [result for part in pool.map(some, range(0, len(items), chunk)) for result in part]


@contextmanager
def quiet() -> Iterator[None]:
    """Without Pillow's warnings; a file that cannot be used raises. For loading only: other threads are affected."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("ignore", require("PIL.Image").DecompressionBombWarning)
        yield
