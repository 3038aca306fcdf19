"""Fixtures of the whole suite."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # read when the package is imported: Triton's kernels then run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from refconv_kernels.ops import UNAVAILABLE

if UNAVAILABLE["triton"] is None:
    from tests import interpreter

    interpreter.quicken()

# Examples are drawn the same way in every run: a failure is a bug to mend, never a matter of luck.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("suite")

#: Every backend for tensors in main memory; the suite runs on the reference path alone where nothing was built.
#: Triton's kernels have tests of their own, few enough for its interpreter.
BACKENDS = [name for name in ("reference", "cpu") if UNAVAILABLE[name] is None]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

needs_native = pytest.mark.skipif(UNAVAILABLE["cpu"] is not None, reason=f"native library: {UNAVAILABLE['cpu']}")


#: A compiler's work of minutes.
SLOW = (
    "test_kernels_under_sanitizers",
    "test_every_kernel_compiles_without_a_spill",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow tests first: one that starts last keeps one core busy while the others have nothing left to do."""
    items.sort(key=lambda item: item.name.split("[")[0] not in SLOW)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill every uninitialised tensor with NaN, so that an output element left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def libraries() -> torch.library.Library:
    """torchvision from PyPI expects operators that PyTorch's CPU builds lack; timm imports torchvision."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
    return library  # the operators live as long as it does
