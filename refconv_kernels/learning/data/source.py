"""From a name or a path to images: which kind of source is it?"""

from __future__ import annotations

from pathlib import Path

from refconv_kernels.learning.data.archive import load_archive
from refconv_kernels.learning.data.cifar import find_cifar, load_cifar
from refconv_kernels.learning.data.digits import digits
from refconv_kernels.learning.data.folder import load_folder
from refconv_kernels.learning.data.images import Data
from refconv_kernels.learning.errors import DataError

__all__ = ["load"]


def load(source: str = "digits", *, image_size: int | None = None) -> Data:
    """Load images to train on and to test with.

    Args:
        source: ``"digits"`` (scikit-learn's), or a path, recognised by what is there:

            - a folder of the CIFAR-10 or CIFAR-100 files, or one that contains such a folder (:func:`load_cifar`);
            - any other folder: image files in one folder per class (:func:`load_folder`);
            - an ``.npz`` file (:func:`load_archive`).

        image_size: of image files in folders, whose shorter side is resized to it and the longer one cropped;
            None is 224, or their own size if it is one and small. Other sources have a size, and None or that
            size is all they take.

    Returns:
        The training and the test images. Where the source has no test images of its own, a fifth of each class
        is taken, the same images at every call.

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
        try:
            if path.is_dir():
                cifar = find_cifar(path)
                if cifar is None:
                    return load_folder(path, image_size)
                data = load_cifar(cifar)
            else:
                data = load_archive(path)
        except OSError as error:
            raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error
    if image_size is not None and data.train.shape[1:] != (image_size, image_size):
        size = " x ".join(map(str, data.train.shape[1:]))
        raise DataError(
            f"{source} has images of {size}, image_size is {image_size}: it applies to folders of files only"
        )
    return data
