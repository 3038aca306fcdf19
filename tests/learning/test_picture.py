"""The picture of the kernels is a readable PNG, whatever the layer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from refconv_kernels.learning.errors import MissingExtra
from refconv_kernels.learning.picture import draw_kernels


@pytest.mark.parametrize("shape", [(32, 1, 3, 3), (2, 2, 5, 3), (1, 1, 3, 3)])
def test_picture_is_a_png(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "kernels.partial"  # the format does not hang on the name
    basis = torch.randn(shape, requires_grad=True)
    draw_kernels(basis, basis * 1.5, path, title="kernels", count=4)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(content[16:20], "big") > 300  # width in pixels


def test_zero_kernels_have_a_scale_too(tmp_path: Path) -> None:
    draw_kernels(torch.zeros(2, 1, 3, 3), torch.zeros(2, 1, 3, 3), tmp_path / "a.png", title="zeros")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"^matplotlib cannot be imported"):
        draw_kernels(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3), tmp_path / "a.png", title="")
