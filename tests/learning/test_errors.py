"""The family of errors, and the optional packages."""

from __future__ import annotations

import pytest

from refconv_kernels.learning import errors, loop
from refconv_kernels.learning.errors import LearningError, MissingExtra, require


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "require"])
def test_every_error_is_a_learning_error_with_its_message(name: str) -> None:
    error = getattr(errors, name)("what to mend")
    assert isinstance(error, LearningError)
    assert str(error) == "what to mend"


def test_they_are_what_they_were() -> None:
    assert issubclass(errors.Diverged, FloatingPointError)
    assert issubclass(errors.MissingExtra, ImportError)
    assert issubclass(errors.CheckFailed, RuntimeError)
    assert loop.CheckFailed is errors.CheckFailed


def test_require() -> None:
    assert require("os.path").join("a", "b")
    with pytest.raises(MissingExtra, match=r'^no_such_package cannot .*: pip install "refconv_kernels\[learn\]"$'):
        require("no_such_package.inner")
