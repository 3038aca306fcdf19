"""Refocusing Learning: pretrain or load, refocus, train, fold, evaluate, save; and compare honestly.

From one command (``python -m refconv_kernels learn``) or from Python:

    >>> from refconv_kernels.learning import Recipe, Settings, learn
    >>> recipe = Recipe(epochs=40, warmup_epochs=2, batch_size=64)
    >>> result = learn(Settings(output="run", data="digits", form="thin", recipe=recipe))  # doctest: +SKIP

or around a network and images of your own, with :func:`train` or, step by step, :class:`Training`.
"""

from refconv_kernels.learning.arms import ARMS
from refconv_kernels.learning.data import Data, ImageSet, MemoryImages, load
from refconv_kernels.learning.errors import LearningError
from refconv_kernels.learning.experiment import run_comparison
from refconv_kernels.learning.fold import fold_file
from refconv_kernels.learning.loop import Training, train
from refconv_kernels.learning.models import build
from refconv_kernels.learning.recipe import Recipe
from refconv_kernels.learning.run import learn
from refconv_kernels.learning.settings import Comparison, Settings
from refconv_kernels.learning.signals import Stopped

__all__ = [
    "ARMS",
    "Comparison",
    "Data",
    "ImageSet",
    "LearningError",
    "MemoryImages",
    "Recipe",
    "Settings",
    "Stopped",
    "Training",
    "build",
    "fold_file",
    "learn",
    "load",
    "run_comparison",
    "train",
]
