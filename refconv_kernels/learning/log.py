"""What a run leaves beside its weights: logs, its environment, and progress while it runs."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from refconv_kernels import __version__
from refconv_kernels.learning.checkpoint import write_file
from refconv_kernels.learning.errors import require
from refconv_kernels.ops import UNAVAILABLE

__all__ = ["Progress", "cpu_name", "environment", "progress", "write_json", "write_logs"]


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, whole or not at all."""
    write_file(path, lambda to: to.write_text(json.dumps(content, indent=1) + "\n"))


def write_logs(directory: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write ``log.csv`` and ``log.jsonl``, one line per epoch. They are written anew each time, so none is twice."""

    def as_csv(path: Path) -> None:
        names = list(dict.fromkeys(name for entry in history for name in entry))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(history)

    write_file(directory / "log.csv", as_csv)
    lines = "".join(json.dumps(entry) + "\n" for entry in history)
    write_file(directory / "log.jsonl", lambda path: path.write_text(lines))


def environment(device: torch.device) -> dict[str, Any]:
    """Where this runs: command, versions, machine; with the settings, what is needed to repeat it."""
    return {
        "command": sys.argv,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "refconv_kernels": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "kernels_off": {backend: reason for backend, reason in UNAVAILABLE.items() if reason is not None},
    }


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or platform.machine()])[0]


def _commit() -> str | None:
    """The commit of this package's own checkout, with ``+`` if files differ from it; None if it is installed."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        ask = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class Progress:
    """Shows how far a training is; see :func:`progress`."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def step(self) -> None:
        self._bar.update()

    def epoch(self, entry: Mapping[str, Any]) -> None:
        shown = {"epoch": entry["epoch"], "loss": f"{entry['loss']:.4f}"}
        if entry.get("accuracy") is not None:
            shown["accuracy"] = f"{entry['accuracy']:.2f} %"
        self._bar.set_postfix(shown, refresh=False)


@contextmanager
def progress(title: str, steps: int, done: int, *, quiet: bool) -> Iterator[Progress]:
    """A bar on a terminal, nothing elsewhere.

    Args:
        title: what is trained.
        steps: of the whole training.
        done: of these, before.
        quiet: no bar in any case.
    """
    quiet = quiet or not sys.stderr.isatty()
    with require("tqdm").tqdm(total=steps, initial=done, desc=title, unit="step", disable=quiet) as bar:
        yield Progress(bar)
