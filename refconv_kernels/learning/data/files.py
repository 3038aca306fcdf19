"""Images in files, decoded when they are taken, or once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from refconv_kernels.learning.data.decoding import decode_all
from refconv_kernels.learning.data.images import ImageSet, to_float
from refconv_kernels.learning.errors import DataError

__all__ = ["FolderImages"]


class FolderImages(ImageSet):
    """Image files as colour images of one size, photographs: mirrored ones are of their class.

    Each is turned as its EXIF data says, resized (antialiased) until it covers ``size``, and cropped to its centre.

    Args:
        files: the ``N`` files, JPEG, PNG, BMP or WebP.
        labels: ``[N]``, int64.
        classes: names of the classes.
        size: height and width.
        pixels: the decoded files, ``[N, 3, H, W]``, uint8; None decodes at every :meth:`take`.
        threads: whether to decode in several threads, which pays for all but small images.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: Tensor,
        classes: Sequence[str],
        size: tuple[int, int],
        *,
        pixels: Tensor | None = None,
        threads: bool = True,
    ) -> None:
        self.files = tuple(files)
        self.labels = labels
        self.classes = tuple(classes)
        self.shape = (3, *size)
        self.mirrored = True
        self._pixels = pixels
        self.in_memory = pixels is not None
        self._rows = torch.arange(len(self.files))  # of this set's images in _pixels, which subsets share
        self._threads = threads

    def take(self, rows: Tensor) -> Tensor:
        """The images ``rows`` as ``[B, 3, H, W]``, float32 from 0 to 1.

        Raises:
            DataError: a file cannot be read (any more); the message names it.
        """
        if self._pixels is not None:
            return to_float(self._pixels[self._rows[rows]])
        files = [self.files[row] for row in rows.tolist()]
        pixels, failed = decode_all(files, self.shape[1:], threads=self._threads)
        if failed:
            number = min(failed)
            raise DataError(f"{files[number]} cannot be read: {failed[number]}")
        return to_float(pixels)

    def subset(self, rows: Tensor) -> FolderImages:
        part = copy.copy(self)
        part.files = tuple(self.files[row] for row in rows.tolist())
        part.labels = self.labels[rows]
        part._rows = self._rows[rows]
        return part
