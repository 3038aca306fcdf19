"""Options of the benchmarks, and the timer."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import machine

ROUND_SECONDS = 1e-3  # at least, so that the clock's resolution does not matter
MEASURED_SECONDS = 0.2  # per benchmark, unless the fewest rounds take longer
FEWEST_ROUNDS, MOST_ROUNDS = 5, 100
PAIRS, WARM_PAIRS = 25, 2  # of what is timed in turns with something else

LOAD = pytest.StashKey[float | None]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("refconv benchmarks")
    group.addoption("--batch", type=int, default=16, help="images per layer benchmark (default: 16)")
    group.addoption("--threads", type=int, default=None, help="threads of PyTorch (default: PyTorch's choice)")
    group.addoption("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--threads") is not None:
        torch.set_num_threads(config.getoption("--threads"))
    # A failed check leaves the timer unused, and its failure says enough.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used at all")
    config.stash[LOAD] = machine.load()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    before = config.stash[LOAD]
    machine_info["refconv"] = {**machine.facts(), "load_before": before, "load_after": machine.load()}


@pytest.fixture
def batch(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--batch")


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.config.getoption("--dtype"))


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., None]:
    """``measure(function, kind=, mode=, shape=, case=, networks=, formulation=, dtype=, batch=, bytes=)``.

    Times ``function`` in rounds and records the rest with the figures. What differs in the formulation alone is one
    group. ``bytes`` are those that one call must move, None where that is not defined. With ``against``, another
    function, the two are timed in turns, ``pairs`` times, and the median ratio of neighbours is recorded, as is the
    shortest time of ``against`` under the name of ``baseline``.
    """

    def run(
        function: Callable[[], object],
        *,
        kind: str,
        mode: str,
        shape: str,
        dtype: torch.dtype,
        against: Callable[[], object] | None = None,
        pairs: int = PAIRS,
        baseline: str | None = None,
        **info: Any,
    ) -> None:
        benchmark.group = f"{kind} {mode} {shape}"
        benchmark.extra_info.update(kind=kind, mode=mode, shape=shape, dtype=str(dtype).removeprefix("torch."), **info)
        benchmark.extra_info["probe"] = machine.probe()
        if against is not None:
            benchmark.extra_info["against"], shortest = in_turns(function, against, pairs)
            if baseline is not None:
                benchmark.extra_info["baseline"] = {baseline: shortest}
            return
        function()
        start = time.perf_counter()
        function()
        once = time.perf_counter() - start
        iterations = max(1, math.ceil(ROUND_SECONDS / once))
        rounds = int(MEASURED_SECONDS / (once * iterations))
        rounds = min(max(rounds, FEWEST_ROUNDS), MOST_ROUNDS)
        benchmark.pedantic(function, rounds=rounds, iterations=iterations, warmup_rounds=1)

    def in_turns(function: Callable[[], object], against: Callable[[], object], pairs: int) -> tuple[float, float]:
        seconds: list[float] = []

        def before() -> None:
            start = time.perf_counter()
            against()
            seconds.append(time.perf_counter() - start)

        own: list[float] = []

        def timed() -> None:
            start = time.perf_counter()
            function()
            own.append(time.perf_counter() - start)

        benchmark.pedantic(timed, setup=before, rounds=pairs, warmup_rounds=WARM_PAIRS)
        ratios = [a / b for a, b in zip(own, seconds, strict=True)]
        return statistics.median(ratios[WARM_PAIRS:] or ratios), min(seconds)

    return run
