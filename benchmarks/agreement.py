"""The check that stands before every timer: a formulation that computes something else is not measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Agreement:
    """Requires errors against float64 of at most twice those of the two-convolution formulation.

    Args:
        expected: results in float64, by name.
        baseline: the same of the two-convolution formulation, in the type that is measured.
        terms: by name, how many products are summed up, where the baseline sums up in an order of its own.
    """

    def __init__(
        self, expected: Mapping[str, Tensor], baseline: Mapping[str, Tensor], terms: Mapping[str, int] | None = None
    ) -> None:
        self.expected = expected
        self.allowed = {}
        for name, tensor in expected.items():
            # The floor is one unit in the last place of the largest value: the baseline may be right by luck. Roundings
            # of a sum add up like steps of a random walk.
            steps = 1 if terms is None else terms[name] ** 0.5
            floor = steps * torch.finfo(baseline[name].dtype).eps * tensor.abs().max().item()
            self.allowed[name] = 2 * self._error(name, baseline[name]) + floor

    def _error(self, name: str, actual: Tensor) -> float:
        return (actual.double() - self.expected[name]).abs().max().item()

    def require(self, formulation: str, actual: Mapping[str, Tensor]) -> None:
        """Raise AssertionError unless all that ``actual`` and the reference have in common agrees."""
        for name in actual.keys() & self.expected.keys():
            error = self._error(name, actual[name])
            if not error <= self.allowed[name]:  # so that a NaN raises
                raise AssertionError(
                    f"{formulation}: {name} is {error:.3e} away from float64, allowed are {self.allowed[name]:.3e}"
                )


def require_same_float64(formulation: str, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise AssertionError unless float64 results agree in half of their digits, relative to the largest value."""
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    allowed = torch.finfo(torch.float64).eps ** 0.5 * largest
    for name in actual.keys() & expected.keys():
        error = (actual[name] - expected[name]).abs().max().item()
        if not error <= allowed:
            raise AssertionError(f"{formulation}: {name} differs by {error:.3e} in float64, allowed are {allowed:.3e}")


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread, for float64 references.

    PyTorch's float64 convolution enters a parallel region for each group, where a busy core delays them all.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
