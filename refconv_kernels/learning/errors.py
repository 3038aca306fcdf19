"""What can go wrong in Refocusing Learning and can be mended by who started it; and the optional packages."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "CheckFailed",
    "CheckpointError",
    "DataError",
    "Diverged",
    "LearningError",
    "MissingExtra",
    "SettingsError",
    "require",
]


class LearningError(Exception):
    """Something the user can mend; the message says what."""


class DataError(LearningError):
    """The images cannot be used: the message names the path, what was found there and the rule."""


class CheckpointError(LearningError):
    """A checkpoint cannot be written, read or used."""


class SettingsError(LearningError):
    """Settings that are wrong, or that contradict one another."""


class Diverged(LearningError, FloatingPointError):
    """The loss of a training is no longer finite."""


class MissingExtra(LearningError, ImportError):
    """A package of an extra is not installed."""


class CheckFailed(LearningError, RuntimeError):
    """Two computations that must agree do not."""


def require(name: str, extra: str | None = "learn") -> Any:
    """Import a module of one of this package's extras; with ``extra=None``, one of a package that is in none.

    Raises:
        MissingExtra: it is not installed, or its import fails; the message names the ``pip`` command.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # torchvision beside another build of torch raises a RuntimeError
        package = name.partition(".")[0]
        command = package if extra is None else f'"refconv_kernels[{extra}]"'
        raise MissingExtra(f"{package} cannot be imported ({error}): pip install {command}") from error
