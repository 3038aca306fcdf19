"""Pictures: what Refocusing Learning did to a layer's kernels, and the curves of trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refconv_kernels.learning.checkpoint import write_file
from refconv_kernels.learning.errors import require

__all__ = ["draw_curves", "draw_kernels"]


def draw_kernels(basis: Tensor, transformed: Tensor, path: Path, *, title: str, count: int = 16) -> None:
    """Draw basis weights, transformed weights and their difference, one column per kernel, as a PNG.

    Blue is negative, white is zero, red is positive. Each kernel is divided by its largest magnitude, which is
    printed under it: a BatchNorm behind the layer undoes the scale of a kernel, so its pattern is what counts.

    Args:
        basis: ``W_b``, ``[C_out, C_in/g, K_h, K_w]``.
        transformed: ``W_t``, the same shape.
        path: file to write.
        title: heading.
        count: kernels to show at most, taken evenly over the layer.

    Raises:
        MissingExtra: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure_type = require("matplotlib.figure").Figure  # without pyplot: no display, no global state
    kernels = basis.detach().flatten(0, 1), transformed.detach().flatten(0, 1)
    total = len(kernels[0])
    shown = torch.arange(min(count, total)) * total // min(count, total)
    before, after = (k[shown].cpu() for k in kernels)
    rows = [("basis $W_b$\n(frozen)", before), ("transformed $W_t$\n(deployed)", after)]
    rows.append(("difference\n$W_t - W_b$", after - before))
    columns = len(shown)
    figure = figure_type(figsize=(2.3 + 0.72 * columns, 3.4), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for r, (label, row) in enumerate(rows):
        for c in range(columns):
            axis = axes[r][c]
            largest = row[c].abs().max().item()
            drawn = axis.imshow((row[c] / (largest or 1.0)).numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(f"{largest:#.2g}", fontsize=8, labelpad=2)
            if r == 0:
                axis.set_title(str(shown[c].item()), fontsize=9)
        axes[r][0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10, labelpad=8)
    figure.colorbar(drawn, ax=axes, shrink=0.9, pad=0.01, label="weight / largest magnitude")
    figure.suptitle(f"{title}\n(each divided by its largest magnitude, printed under it)", fontsize=10)
    figure.savefig(path, format="png", dpi=150)


def draw_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw training loss and test accuracy by epoch as a PNG, a line per training.

    Args:
        histories: by name: entries with ``epoch``, ``loss`` and ``accuracy``, either of which may be None.
        path: file to write.

    Raises:
        MissingExtra: matplotlib is not installed.
        CheckpointError: the file cannot be written.
    """
    figure = require("matplotlib.figure").Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, key, label in ((left, "loss", "training loss (nats)"), (right, "accuracy", "test accuracy in %")):
        for name, history in histories.items():
            points = [(entry["epoch"], entry[key]) for entry in history if entry[key] is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else None)
        axis.set(xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.3)
    if right.get_legend_handles_labels()[0]:
        right.legend()
    write_file(path, lambda to: figure.savefig(to, format="png", dpi=110))
