"""From a name or a path to images: which kind of source is it?"""

from __future__ import annotations

from pathlib import Path

from refconv_kernels.learning.data.archive import load_archive
from refconv_kernels.learning.data.digits import digits
from refconv_kernels.learning.data.images import Data
from refconv_kernels.learning.errors import DataError

__all__ = ["load"]


def load(source: str = "digits", *, image_size: int | None = None) -> Data:
    """Load images to train on and to test with.

    Args:
        source: ``"digits"``, or a path.
        image_size: of a folder of files.

    Raises:
        DataError: there is nothing of these kinds, or it is damaged.
        MissingExtra: a package of the ``learn`` extra is not installed.
    """
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size (={image_size}) must be at least 1")
    if source == "digits":
        data = Data("digits", *digits())
    else:
        path = Path(source).expanduser()
        if not path.exists():
            raise DataError(f"{path} does not exist: the data is 'digits', a folder or an .npz file")
        data = load_archive(path)
    if image_size is not None and data.train.shape[1:] != (image_size, image_size):
        size = " x ".join(map(str, data.train.shape[1:]))
        raise DataError(
            f"{source} has images of {size}, image_size is {image_size}: it applies to folders of files only"
        )
    return data
