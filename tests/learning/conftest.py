"""Fixtures of the tests of learning."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from refconv_kernels.learning.data import MemoryImages, digits


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small are slower on several threads, and far slower where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def few() -> MemoryImages:
    """A hundred handwritten digits."""
    return digits(100)[0]
