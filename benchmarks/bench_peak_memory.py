"""Peak memory of whole training steps, each formulation in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.formulations import FORMULATIONS

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("MobileNetV2_b8_224px", "MobileNetV3-L_b32_64px", "ResNet-18_b8_112px")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc, which is Linux")
@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_peak_memory(name: str, formulation: str, benchmark: Any) -> None:
    command = [sys.executable, "-m", "benchmarks.peak_memory", name, formulation]

    def measure() -> str:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    peak, allocated, refocusing = map(int, benchmark.pedantic(measure, rounds=1).splitlines()[-1].split())
    assert peak > 0
    assert allocated > 0
    benchmark.group = f"peak memory {name}"
    benchmark.extra_info.update(
        kind="peak memory",
        mode="training step",
        shape=name,
        case=None,
        networks={name.partition("_")[0]: 1},
        formulation=formulation,
        dtype="float32",
        batch=None,
        bytes=None,
        peak_bytes=peak,
        allocated_bytes=allocated,
        refocus_bytes=refocusing,
    )
