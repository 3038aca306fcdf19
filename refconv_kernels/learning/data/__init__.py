"""Images to train on and to test with, from several sources."""

from refconv_kernels.learning.data.digits import DIGITS_TRAIN, digits
from refconv_kernels.learning.data.files import FolderImages
from refconv_kernels.learning.data.images import Data, ImageSet, MemoryImages
from refconv_kernels.learning.data.moments import statistics
from refconv_kernels.learning.data.source import load
from refconv_kernels.learning.data.split import hold_out

__all__ = [
    "DIGITS_TRAIN",
    "Data",
    "FolderImages",
    "ImageSet",
    "MemoryImages",
    "digits",
    "hold_out",
    "load",
    "statistics",
]
