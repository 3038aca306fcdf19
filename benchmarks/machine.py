"""The machine that the benchmarks run on: what it is, and how much of it they have at the moment."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from refconv_kernels import current_backend

_PROBES = 5  # the shortest of so many


def facts() -> dict[str, Any]:
    """What does not change during a run."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backend": current_backend(),
        "instruction_set": _instruction_set(),
        "commit": _commit(),
    }


def load() -> float | None:
    """Running processes, a mean over the last minute: others than this one disturb the figures."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def probe() -> tuple[float, float]:
    """Seconds of as many sines per thread, in one thread and in all of them; they stay in the caches.

    Two virtual cores may be one real core's two halves, or a neighbour may have the other half: then arithmetic takes
    up to twice as long, and no load average tells.
    """
    threads = torch.get_num_threads()
    x = torch.full((1 << 16,), 0.5)
    try:
        torch.set_num_threads(1)
        one = _seconds(x, torch.empty_like(x))
    finally:
        torch.set_num_threads(threads)
    wide = x.repeat(threads)
    return one, _seconds(wide, torch.empty_like(wide))


def _seconds(x: torch.Tensor, to: torch.Tensor) -> float:
    found = []
    for _ in range(_PROBES):
        start = time.perf_counter()
        torch.sin(x, out=to)
        found.append(time.perf_counter() - start)
    return min(found)


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or None


def _instruction_set() -> str | None:
    try:
        from refconv_kernels import _C
    except ImportError:
        return None
    return _C.instruction_set()


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
