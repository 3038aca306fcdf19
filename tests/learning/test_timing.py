"""Timing of training steps: in turns, and never of formulations that disagree."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from refconv_kernels import reference, reparameterize, use_backend
from refconv_kernels.learning import timing
from refconv_kernels.learning.data import MemoryImages
from refconv_kernels.learning.errors import CheckFailed
from refconv_kernels.learning.models import SmallSeparableNet
from refconv_kernels.learning.recipe import Recipe
from refconv_kernels.learning.timing import compare_steps, step_times

RECIPE = Recipe(epochs=2, warmup_epochs=1, batch_size=32, crop_padding=1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return SmallSeparableNet(widths=(8, 16, 24))


def test_steps_are_timed_in_turns() -> None:
    calls: list[str] = []
    times = step_times({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * (len(calls) // 2)
    assert list(times) == ["a", "b"]
    assert all(len(ms) == 3 and min(ms) >= 0 for ms in times.values())


def test_comparing_steps_leaves_the_network_alone(few: MemoryImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "step_times", lambda steps: step_times(steps, rounds=2))
    model = network()
    before = reparameterize(model).state_dict()
    figures = compare_steps(model, few, RECIPE)
    assert figures["batch"] == 32
    assert figures["rounds"] == 2
    assert figures["gradient_difference"]["float64"] < 1e-12
    assert figures["gradient_difference"]["float32"] < 0.05
    assert list(figures["ms"]) == list(figures["ms_median"]) == ["plain", "two_convolutions", "ours"]
    assert all(0 < figures["ms"][name] <= figures["ms_median"][name] for name in figures["ms"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("scale", [1.0001, math.nan])
def test_formulations_that_disagree_are_not_timed(
    few: MemoryImages, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    @contextmanager
    def wrong(backend: str) -> Iterator[None]:
        with use_backend("reference"), monkeypatch.context() as patch:
            if backend == "auto":
                patch.setattr(reference, "conv2d", lambda *arguments: scale * right(*arguments))
            yield

    right = reference.conv2d
    monkeypatch.setattr(timing, "use_backend", wrong)
    monkeypatch.setattr(timing, "step_times", lambda _: pytest.fail("timed"))
    with pytest.raises(CheckFailed, match=r"in torch.float64, loss and gradients .* differ from those of two"):
        compare_steps(network(), few, RECIPE)
