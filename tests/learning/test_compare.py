"""The verdict on paired differences: Student's interval, and silence where there is none."""

from __future__ import annotations

import statistics
import sys

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from refconv_kernels.learning.compare import compare
from refconv_kernels.learning.errors import MissingExtra

GAIN, LOSS = "a gain: the interval excludes zero", "a loss: the interval excludes zero"
NOTHING = "no difference could be measured: the interval includes zero"


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12))
def test_the_interval_is_students(differences: list[float]) -> None:
    from scipy import stats

    assume(statistics.stdev(differences) > 1e-3)
    found = compare(differences)
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert found.mean == pytest.approx(statistics.fmean(differences))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)
    assert found.verdict == (GAIN if found.low > 0 else LOSS if found.high < 0 else NOTHING)  # type: ignore[operator]
    mirrored = compare([-d for d in differences])
    assert mirrored.verdict == {GAIN: LOSS, LOSS: GAIN}.get(found.verdict, NOTHING)


def test_an_interval_by_hand() -> None:
    found = compare([1.0, 2.0, 3.0])
    half = 4.302653 / 3**0.5  # Student's t at 0.975 with 2 degrees of freedom; the deviation is 1
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2 - half, 2 + half), rel=1e-6)
    assert found.verdict == NOTHING
    assert compare([1.0, 2.0, 3.0, 2.0]).verdict == GAIN
    assert compare([-1.0, -2.0, -3.0, -2.0]).verdict == LOSS


@pytest.mark.parametrize("difference", [0.0, 0.5, -3.0])
def test_one_seed_gives_no_interval(difference: float) -> None:
    found = compare([difference])
    assert (found.mean, found.low, found.high) == (difference, None, None)
    assert found.verdict == "no difference could be measured: no interval from one seed"


@pytest.mark.parametrize(
    "differences",
    [
        [0.0, 0.0],
        [0.5, 0.5, 0.5],
        [97.1 - 96.8, 10.3 - 10.0, 1.3 - 1.0],  # three images of a thousand, but for rounding
        [-100 * 5 / 1197] * 2,
    ],
)
def test_equal_differences_give_no_interval(differences: list[float]) -> None:
    found = compare(differences)
    assert (found.low, found.high) == (None, None)
    assert found.verdict == f"no difference could be measured: no interval from {len(differences)} equal differences"


def test_one_image_of_a_million_is_no_rounding() -> None:
    assert compare([1e-4, 2e-4, 1e-4, 2e-4, 1e-4]).verdict == GAIN


def test_no_differences() -> None:
    with pytest.raises(statistics.StatisticsError):
        compare([])


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(MissingExtra, match=r'^scipy cannot be imported .*pip install "refconv_kernels\[learn\]"$'):
        compare([1.0, 2.0])
    assert compare([1.0]).low is None  # needs none
