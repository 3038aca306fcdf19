"""Installation: without a compiler it succeeds and says what is missing; REFCONV_BUILD makes it strict."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def build(tmp_path: Path, **env: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """``setup.py build`` of a copy of the sources, into a folder of its own."""
    source = tmp_path / "source"
    for name in ("refconv_kernels", "csrc"):
        ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path / "out"
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-lib",
        str(out),
        "--build-temp",
        str(tmp_path / "temp"),
    ]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("REFCONV_")}
    done = subprocess.run(command, cwd=source, env={**clean, **env}, capture_output=True, text=True)
    return done, out / "refconv_kernels"


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"REFCONV_BUILD": "0"}, "REFCONV_BUILD=0 was set when installing"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler was found when installing (no-such-compiler)"),
    ],
)
def test_without_the_native_library_everything_runs_on_the_reference_path(
    tmp_path: Path, env: dict[str, str], reason: str
) -> None:
    done, package = build(tmp_path, **env)
    assert done.returncode == 0, done.stderr
    line = [line for line in done.stderr.splitlines() if line.startswith("refconv_kernels:")]
    assert line == [f"refconv_kernels: native kernels skipped, the reference path will run: {reason}"]
    assert json.loads((package / "_build.json").read_text()) == {"skipped": reason, "extension": "_C"}
    assert not list(package.glob("*.so"))

    code = (
        "import sys\n"  # an editable installation would lend its native library to the copy
        "sys.meta_path = [finder for finder in sys.meta_path if 'Editable' not in repr(finder)]\n"
        "import torch, refconv_kernels as rk\n"
        "layer = rk.RefConv2d(4, 4, 3, groups=4)\n"
        "layer(torch.randn(1, 4, 5, 5)).sum().backward()\n"
        "print(rk.__file__)\n"
        "try:\n"
        "    rk.use_backend('cpu').__enter__()\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=package.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(package) in done.stdout
    assert f"name (='cpu') cannot run here: the native library was not built: {reason}" in done.stdout


def test_without_the_functions_in_cpp_there_are_those_in_python(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    cmake = tools / "cmake"  # stands for torch's headers of a release that has others
    cmake.write_text('#!/bin/sh\ncase "$*" in *_autograd*) echo "error: no such header"; exit 1;; esac\n')
    cmake.chmod(0o755)
    environment = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    done, package = build(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    reason = "the native build failed: error: no such header"
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("refconv_kernels:")]
    assert line == f"refconv_kernels: autograd Functions in C++ skipped, those in Python will run: {reason}"
    assert json.loads((package / "_build.json").read_text()) == {"skipped": reason, "extension": "_autograd"}
    done, _ = build(tmp_path / "strict", **environment, REFCONV_BUILD="1")
    assert done.returncode != 0
    assert f"refconv_kernels: {reason} (REFCONV_BUILD=1)" in done.stderr


def test_a_required_build_that_fails_is_fatal(tmp_path: Path) -> None:
    done, _ = build(tmp_path, REFCONV_BUILD="1", CXX="no-such-compiler")
    assert done.returncode != 0
    assert (
        "refconv_kernels: no C++ compiler was found when installing (no-such-compiler) (REFCONV_BUILD=1)" in done.stderr
    )


def test_a_compiler_that_fails_is_reported_in_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: out of order' >&2\nexit 1\n")
    broken.chmod(0o755)
    done, package = build(tmp_path, CXX=str(broken))
    assert done.returncode == 0, done.stderr
    reason = json.loads((package / "_build.json").read_text())["skipped"]
    assert reason.startswith("the native build failed: ")
    assert "\n" not in reason
