"""The schedule and the optimizer of the recipe."""

from __future__ import annotations

import math

import pytest
from torch import nn

from refconv_kernels import refocus
from refconv_kernels.learning.recipe import Recipe


def test_defaults_are_the_papers() -> None:
    recipe = Recipe()
    assert (recipe.epochs, recipe.warmup_epochs, recipe.batch_size) == (100, 5, 256)
    assert (recipe.lr, recipe.momentum, recipe.weight_decay) == (0.1, 0.9, 4e-5)


def test_what_the_paper_does_not_do_is_off() -> None:
    recipe = Recipe()
    assert (recipe.nesterov, recipe.label_smoothing, recipe.accumulation) == (False, 0.0, 1)
    assert recipe.clip_norm is recipe.ema is recipe.crop_padding is recipe.flip is None


def test_learning_rate_follows_the_formula() -> None:
    recipe = Recipe(epochs=10, warmup_epochs=2, lr=0.4)
    rates = [recipe.learning_rate(step, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([0.04 * n for n in range(1, 11)])  # rises to lr in 10 steps
    assert rates[10] == 0.4
    assert rates[30] == pytest.approx(0.2)  # half-way down the cosine
    assert rates[20] == pytest.approx(0.2 * (1 + math.cos(math.pi / 4)))
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.001
    assert recipe.learning_rate(50, 5) == pytest.approx(0)


def test_without_warmup_the_cosine_starts_at_once() -> None:
    recipe = Recipe(epochs=1, warmup_epochs=0, lr=0.1)
    assert [recipe.learning_rate(step, 2) for step in range(2)] == pytest.approx([0.1, 0.05])


@pytest.mark.parametrize(("images", "steps"), [(1, 1), (64, 1), (65, 2), (600, 10)])
def test_the_last_batch_counts(images: int, steps: int) -> None:
    assert Recipe(batch_size=64).steps_per_epoch(images) == steps


def test_optimizer_leaves_the_frozen_basis_out() -> None:
    model = refocus(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False)))
    (group,) = Recipe(lr=0.3).optimizer(model).param_groups
    assert [p.shape for p in group["params"]] == [model[0].transform.weight.shape]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.3, 0.9, 4e-5, False)


def test_the_optimizer_has_the_recipes_numbers() -> None:
    recipe = Recipe(lr=0.5, momentum=0.7, weight_decay=0.01, nesterov=True)
    (group,) = recipe.optimizer(nn.Linear(2, 2)).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.5, 0.7, 0.01, True)
    (group,) = Recipe(momentum=0.0, weight_decay=0.0).optimizer(nn.Linear(2, 2)).param_groups
    assert (group["momentum"], group["weight_decay"]) == (0, 0)


def test_the_ends_of_the_ranges_are_allowed() -> None:
    Recipe(
        epochs=1, warmup_epochs=0, batch_size=1, accumulation=1, momentum=0.0, ema=0.0, crop_padding=0, clip_norm=1e-9
    )
    Recipe(batch_size=4, accumulation=4, label_smoothing=0.999, ema=0.9999, flip=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, r"epochs \(=0\) must be at least 1"),
        ({"batch_size": 0}, r"batch_size \(=0\) must be at least 1"),
        ({"warmup_epochs": -1}, r"warmup_epochs \(=-1\) must be at least 0"),
        ({"crop_padding": -1}, r"crop_padding \(=-1\) must be at least 0"),
        ({"epochs": 5}, r"warmup_epochs \(=5\) must be less than epochs \(=5\)"),
        ({"lr": 0.0}, r"lr \(=0.0\) must be positive"),
        ({"lr": math.nan}, r"lr \(=nan\) must be positive"),
        ({"lr": math.inf}, r"lr \(=inf\) must be positive"),
        ({"clip_norm": 0.0}, r"clip_norm \(=0.0\) must be positive"),
        ({"clip_norm": math.nan}, r"clip_norm \(=nan\) must be positive"),
        ({"accumulation": 0}, r"accumulation \(=0\) must be at least 1"),
        ({"batch_size": 4, "accumulation": 5}, r"accumulation \(=5\) must be at most batch_size \(=4\)"),
        ({"momentum": 1.0}, r"momentum \(=1.0\) must be at least 0 and less than 1"),
        ({"momentum": -0.1}, r"momentum \(=-0.1\) must be at least 0 and less than 1"),
        ({"label_smoothing": 1.0}, r"label_smoothing \(=1.0\) must be at least 0 and less than 1"),
        ({"label_smoothing": math.nan}, r"label_smoothing \(=nan\) must be at least 0 and less than 1"),
        ({"ema": 1.0}, r"ema \(=1.0\) must be at least 0 and less than 1"),
        ({"ema": -0.5}, r"ema \(=-0.5\) must be at least 0 and less than 1"),
        ({"weight_decay": -1e-9}, r"weight_decay \(=-1e-09\) must be at least 0"),
        ({"weight_decay": math.inf}, r"weight_decay \(=inf\) must be at least 0"),
        ({"nesterov": True, "momentum": 0.0}, r"nesterov \(=True\) needs momentum, which is 0"),
    ],
)
def test_numbers_out_of_range_raise(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**options)  # type: ignore[arg-type]
