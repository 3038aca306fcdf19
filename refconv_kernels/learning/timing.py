"""How long a training step takes, with RefConv in each formulation and without; checked before it is timed."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refconv_kernels import refocus, use_backend
from refconv_kernels.learning.data import ImageSet
from refconv_kernels.learning.errors import CheckFailed
from refconv_kernels.learning.loop import train_step
from refconv_kernels.learning.recipe import Recipe

__all__ = ["compare_steps", "step_times"]


def step_times(steps: Mapping[str, Callable[[], object]], rounds: int = 60) -> dict[str, list[float]]:
    """Times of each of ``steps`` in ms, measured in turns, so that what disturbs one disturbs all.

    Args:
        steps: what to time, by name; each is called once per round, and a few times before.
        rounds: measurements of each.
    """
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-5, rounds):  # the negative ones warm up
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number >= 0:
                taken[name].append(1e3 * (time.perf_counter() - start))
    return taken


def compare_steps(baseline: nn.Module, data: ImageSet, recipe: Recipe) -> dict[str, Any]:
    """Check that both formulations of RefConv compute the same; then time a step of each and of the plain network.

    The networks are ``"plain"``, ``baseline`` itself; ``"two_convolutions"``, RefConv in plain PyTorch; and
    ``"ours"``, RefConv on the kernels that the library chooses. ``baseline`` is left as it is.

    Returns:
        ``batch`` (images); ``gradient_difference`` by dtype, the norm of the difference over the norm;
        ``rounds``; ``ms`` and ``ms_median``, fastest and median step by network, in float32.

    Raises:
        CheckFailed: the formulations differ by more than rounding.
    """
    rows = torch.arange(min(recipe.batch_size, len(data)))
    images, labels = data.take(rows), data.labels[rows]
    refocused = refocus(baseline).train()
    differences = {
        str(dtype).removeprefix("torch."): _gradient_difference(refocused.to(dtype), images.to(dtype), labels, limit)
        # In float32 rounding can carry a ReLU's input across zero, which changes its gradient altogether.
        for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 0.05))
    }
    times = step_times(
        {
            "plain": _step(copy.deepcopy(baseline).train(), "reference", recipe, images, labels),
            "two_convolutions": _step(copy.deepcopy(refocused), "reference", recipe, images, labels),
            "ours": _step(refocused, "auto", recipe, images, labels),
        }
    )
    return {
        "batch": len(images),
        "gradient_difference": differences,
        "rounds": len(times["plain"]),
        "ms": {name: min(ms) for name, ms in times.items()},  # what else runs only ever adds time
        "ms_median": {name: statistics.median(ms) for name, ms in times.items()},
    }


def _step(model: nn.Module, backend: str, recipe: Recipe, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    optimizer = recipe.optimizer(model)
    optimizer.param_groups[0]["lr"] = 0.0  # the same work, and the same numbers in every round

    def step() -> Tensor:
        with use_backend(backend):
            return train_step(model, optimizer, images, labels)

    return step


def _gradient_difference(refocused: nn.Module, images: Tensor, labels: Tensor, limit: float) -> float:
    """How far loss and gradients on the chosen kernels are from those on the reference path, relatively."""
    results = []
    for backend in ("auto", "reference"):
        model = copy.deepcopy(refocused)
        with use_backend(backend):
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
        results.append(torch.cat([loss[None], *(p.grad.flatten() for p in model.parameters() if p.grad is not None)]))
    ours, expected = results
    difference = ((ours - expected).norm() / expected.norm()).item()
    if not difference <= limit:
        raise CheckFailed(
            f"in {images.dtype}, loss and gradients of RefConv on this library's kernels differ from those of two "
            f"PyTorch convolutions by {difference:.3g} of their norm; rounding explains at most {limit:.3g}"
        )
    return difference
