"""The kernels' C++ tests, built without torch under AddressSanitizer and UBSan, and the native build's facts."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from refconv_kernels.backends import cpu
from tests.conftest import needs_native

ROOT = Path(__file__).resolve().parents[1]
needs_compiler = pytest.mark.skipif(
    not (shutil.which("c++") and shutil.which("cmake")), reason="no C++ compiler or no cmake on this machine"
)


@needs_compiler
def test_kernels_under_sanitizers(tmp_path: Path) -> None:
    """The widest vectors, and the portable code, whose partial loads are plain ones that AddressSanitizer sees."""
    options = ["-DREFCONV_PYTHON=OFF", "-DREFCONV_KERNEL_TESTS=ON", "-DREFCONV_SANITIZE=address,undefined"]
    widest = [name for name in cpu.native.instruction_sets() if name != "portable"][:1] if cpu.native else ["avx512"]
    # All four take minutes more, and share their sources.
    options += [f"-DREFCONV_INSTRUCTION_SETS={';'.join(widest)}"]
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1"]
    for command in ([*configure, *generator, *options], ["cmake", "--build", str(tmp_path)]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning:" not in done.stdout
    # Leaks cannot be looked for under a debugger or in some containers; the kernels own memory by scope. Freed memory
    # is not held back for long: most of it was large, and fresh pages take longer than the kernels.
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=8"}
    done = subprocess.run([tmp_path / "kernel_tests"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "portable: done" in done.stdout
    assert ", 0 failed" in done.stdout


def test_kernels_include_no_torch() -> None:
    sources = [ROOT / "csrc/problem.h", *(ROOT / "csrc/cpu").iterdir()]
    assert len(sources) > 5
    for source in sources:
        assert "#include <torch" not in source.read_text(), source.name


@needs_native
@pytest.mark.skipif(not shutil.which("nm"), reason="no nm on this machine")
def test_library_needs_only_stable_symbols_of_torch() -> None:
    """One binary serves every torch release from 2.11 on: no C++ symbol of torch may be needed."""
    text = subprocess.run(
        ["nm", "-D", "-u", "-C", cpu.native.__file__], capture_output=True, text=True, check=True
    ).stdout
    needed = [line.split(" U ", 1)[-1].strip() for line in text.splitlines()]
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in needed)
    assert [name for name in needed if name.startswith(("at::", "c10::", "torch::"))] == []
