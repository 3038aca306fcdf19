"""Drives CMake for the native kernels; everything else is in pyproject.toml.

Two extensions: ``_C``, the kernels, in torch's stable ABI, and ``_autograd``, which calls them, for one release of
torch; without the second the same calls are made in Python.
REFCONV_BUILD=0 skips the native build, REFCONV_BUILD=1 makes its failure fatal. Unset, a failure leaves an
installation that works on the reference path, and ``python -m refconv_kernels info`` says what was missing.
On systems other than Linux the native build is tried only with REFCONV_BUILD=1.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
WANTED = os.environ.get("REFCONV_BUILD", "")


class Skipped(Exception):
    """Why there is no native library, in one line."""


def torch_dir() -> Path:
    """The installed torch package: of this interpreter, or of the environment that an isolated build serves."""
    candidates = [os.environ.get("REFCONV_TORCH_DIR")]
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        candidates.append(str(Path(spec.origin).parent))
    roots = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if "VIRTUAL_ENV" in os.environ:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        roots.append(str(Path(os.environ["VIRTUAL_ENV"]) / "lib" / version / "site-packages"))
    candidates += [str(Path(root) / "torch") for root in roots]
    for candidate in filter(None, candidates):
        if (Path(candidate) / "include/torch/csrc/stable/library.h").exists():
            return Path(candidate)
    raise Skipped("torch>=2.11 was not found when installing; install torch first, then refconv_kernels again")


def configure_native(output: Path, build_dir: Path) -> None:
    """Find the tools and configure the build, into ``build_dir``, of extensions that go to ``output``."""
    if WANTED == "0":
        raise Skipped("REFCONV_BUILD=0 was set when installing")
    if WANTED != "1" and platform.system() != "Linux":
        raise Skipped(f"on {platform.system()} the native build is tried only with REFCONV_BUILD=1")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or not shutil.which(compiler.split()[0]):
        raise Skipped(f"no C++ compiler was found when installing ({compiler or 'c++, g++, clang++'})")
    cmake = shutil.which("cmake")
    if not cmake:
        raise Skipped("cmake was not found when installing")
    import pybind11

    shutil.rmtree(build_dir, ignore_errors=True)  # its cache names tools of an isolated build that is gone
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = [
        cmake,
        *generator,
        *("-S", str(ROOT), "-B", str(build_dir)),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_CXX_COMPILER={compiler.split()[0]}",
        f"-DREFCONV_TORCH_DIR={torch_dir()}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DREFCONV_EXTENSION_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.resolve()}",
    ]
    run(configure)


def run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        sys.stderr.write(done.stdout)
        lines = [line.strip() for line in done.stdout.splitlines() if "error" in line.lower()]
        raise Skipped(f"the native build failed: {lines[0] if lines else command}")


#: What happens without each extension.
SKIPPED = {
    "_C": "native kernels skipped, the reference path will run",
    "_autograd": "autograd Functions in C++ skipped, those in Python will run",
}


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        build_dir, note = Path(self.build_temp).resolve() / "cmake", target.parent / "_build.json"
        try:
            if name == "_C":
                note.unlink(missing_ok=True)
                configure_native(target.parent, build_dir)
            elif note.exists():  # no kernels to call
                return target.unlink(missing_ok=True)
            run(["cmake", "--build", str(build_dir), "--target", name])
        except Skipped as reason:
            if WANTED == "1":
                raise SystemExit(f"refconv_kernels: {reason} (REFCONV_BUILD=1)") from None
            target.unlink(missing_ok=True)
            note.write_text(json.dumps({"skipped": str(reason), "extension": name}) + "\n")
            print(f"refconv_kernels: {SKIPPED[name]}: {reason}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """An editable install: copy what was built, or the note that says why nothing was."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(self.get_ext_fullname(ext.name))
            for source in (built, built.parent / "_build.json"):
                target = ROOT / "refconv_kernels" / source.name
                target.unlink(missing_ok=True)
                if source.exists():
                    shutil.copy2(source, target)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


setup(
    ext_modules=[Extension(f"refconv_kernels.{name}", sources=[]) for name in SKIPPED],
    cmdclass={"build_ext": CMakeBuild},
)
