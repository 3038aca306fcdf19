"""The pictures are readable PNGs, whatever the layer and the training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from refconv_kernels.learning.errors import CheckpointError, MissingExtra
from refconv_kernels.learning.picture import draw_curves, draw_kernels


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


# --- curves -------------------------------------------------------------------------------------------------


def history(*figures: tuple[float | None, float | None]) -> list[dict[str, Any]]:
    return [{"epoch": n, "loss": loss, "accuracy": right} for n, (loss, right) in enumerate(figures, 1)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    return figures


def test_curves_show_what_was_measured(tmp_path: Path, drawn: list[Any]) -> None:
    histories = {
        "baseline": history((2.5, 40.0), (1.5, None), (0.5, 90.0)),
        "only evaluated": [{"epoch": 0, "loss": None, "accuracy": 85.0}],
        "never evaluated": history((1.0, None), (0.25, None)),
    }
    draw_curves(histories, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    (figure,) = drawn
    left, right = figure.axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("training loss (nats)", "test accuracy in %")
    assert left.get_xlabel() == right.get_xlabel() == "epoch"
    lines = [
        {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axis.get_lines()}
        for axis in (left, right)
    ]
    assert lines[0] == {"baseline": [(1, 2.5), (2, 1.5), (3, 0.5)], "never evaluated": [(1, 1.0), (2, 0.25)]}
    assert lines[1] == {"baseline": [(1, 40.0), (3, 90.0)], "only evaluated": [(0, 85.0)]}
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["baseline", "only evaluated"]


def test_a_single_point_is_visible(tmp_path: Path, drawn: list[Any]) -> None:
    draw_curves({"short": history((1.0, 50.0)), "long": history(*[(1.0, 50.0)] * 40)}, tmp_path / "a.png")
    short, long = drawn[0].axes[0].get_lines()
    assert short.get_marker() == "."
    assert long.get_marker() in ("None", "", None)


@pytest.mark.parametrize("histories", [{}, {"a": []}, {"a": history((None, None))}])
def test_nothing_to_draw(tmp_path: Path, histories: dict[str, Any]) -> None:
    draw_curves(histories, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_curves_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^cannot write .*a.png: No such file or directory; nothing was left"):
        draw_curves({"a": history((1.0, 50.0))}, tmp_path / "missing" / "a.png")


def test_curves_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"^matplotlib cannot be imported"):
        draw_curves({}, tmp_path / "a.png")
