"""Fixtures of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from refconv_kernels.ops import UNAVAILABLE

# Examples are drawn the same way in every run: a failure is a bug to mend, never a matter of luck.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("suite")

#: Every backend that runs here; the suite runs on the reference path alone where nothing was built.
BACKENDS = [name for name, reason in UNAVAILABLE.items() if reason is None]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

needs_native = pytest.mark.skipif(UNAVAILABLE["cpu"] is not None, reason=f"native library: {UNAVAILABLE['cpu']}")


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
