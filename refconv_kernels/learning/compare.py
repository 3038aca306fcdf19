"""Is one arm of an experiment better than another? Paired differences and what they allow to be said."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from refconv_kernels.learning.errors import require

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """Mean of paired differences, its 95 % confidence interval (None where they give none), and the verdict."""

    mean: float
    low: float | None
    high: float | None
    verdict: str


def compare(differences: Sequence[float]) -> Comparison:
    """Judge paired differences, one per seed, by Student's t: only an interval without zero is a finding."""
    mean, n = statistics.fmean(differences), len(differences)
    spread = statistics.stdev(differences) if n > 1 else 0.0
    if spread <= 1e-9 * max(map(abs, differences)):  # equal but for the rounding of percentages
        seeds = "one seed" if n == 1 else f"{n} equal differences"
        return Comparison(mean, None, None, f"no difference could be measured: no interval from {seeds}")
    half = float(require("scipy.stats").t.ppf(0.975, n - 1)) * spread / n**0.5
    if mean - half > 0:
        verdict = "a gain: the interval excludes zero"
    elif mean + half < 0:
        verdict = "a loss: the interval excludes zero"
    else:
        verdict = "no difference could be measured: the interval includes zero"
    return Comparison(mean, mean - half, mean + half, verdict)
