"""The family of errors, and the optional packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from refconv_kernels.learning import errors
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


def test_require() -> None:
    assert require("os.path").join("a", "b")
    with pytest.raises(MissingExtra, match=r'^no_such_package cannot .*: pip install "refconv_kernels\[learn\]"$'):
        require("no_such_package.inner")


def test_require_of_a_package_in_no_extra() -> None:
    with pytest.raises(MissingExtra, match=r"^no_such_package cannot .*: pip install no_such_package$"):
        require("no_such_package.inner", extra=None)


def test_require_of_a_package_whose_import_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingExtra, match=r"^broken_package cannot be imported \(operator torchvision::nms does not"):
        require("broken_package")
