"""The training loop: reproducible, paired, and it learns."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from refconv_kernels import reference, refocus, reparameterize, use_backend
from refconv_kernels.learning import loop
from refconv_kernels.learning.data import MemoryImages, digits
from refconv_kernels.learning.errors import CheckFailed, Diverged
from refconv_kernels.learning.loop import accuracy, compare_steps, logits, step_times, train
from refconv_kernels.learning.models import SmallSeparableNet
from refconv_kernels.learning.recipe import Recipe

RECIPE = Recipe(epochs=2, warmup_epochs=1, batch_size=32, crop_padding=1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small are slower on several threads, and far slower where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def few() -> MemoryImages:
    return digits(100)[0]


def network() -> nn.Module:
    torch.manual_seed(0)
    return SmallSeparableNet(widths=(8, 16, 24))


class Linear(nn.Module):
    """Keeps the images that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return self.layer(images.flatten(1))


@pytest.mark.parametrize("convert", [copy.deepcopy, refocus])
def test_same_seed_gives_the_same_weights_to_the_bit(
    few: MemoryImages, convert: Callable[[nn.Module], nn.Module]
) -> None:
    start = convert(network())
    trained = []
    for seed in (5, 5, 6):
        torch.rand(1)  # the loop does not depend on the global generator
        model = copy.deepcopy(start)
        train(model, few, RECIPE, seed=seed)
        trained.append(model.state_dict())
    assert all(torch.equal(trained[0][key], trained[1][key]) for key in trained[0])
    assert not all(torch.equal(trained[0][key], trained[2][key]) for key in trained[0])


def test_two_networks_with_one_seed_see_the_same_images(few: MemoryImages) -> None:
    first, second = Linear(), Linear()
    for model in (first, second):
        train(model, few, RECIPE, seed=1)
    assert [len(images) for images in first.seen] == [32, 32, 32, 4] * 2
    assert all(torch.equal(a, b) for a, b in zip(first.seen, second.seen, strict=True))
    assert not torch.equal(first.seen[0], first.seen[4])  # each epoch has its own order


def test_each_epoch_uses_every_image_once(few: MemoryImages) -> None:
    model = Linear()
    train(model, few, Recipe(epochs=1, warmup_epochs=0, batch_size=32, crop_padding=0), seed=0)
    seen = torch.cat(model.seen).flatten(1).tolist()
    assert sorted(seen) == sorted(few.images.flatten(1).tolist())


def test_loss_goes_down_and_is_reported(few: MemoryImages) -> None:
    reported: list[float] = []
    recipe = Recipe(epochs=12, warmup_epochs=1, batch_size=10, crop_padding=0)
    model = network()
    losses = train(model, few, recipe, seed=0, on_epoch=reported.append)
    assert losses == reported
    assert len(losses) == 12
    assert losses[0] == pytest.approx(math.log(10), rel=0.3)
    assert losses[-1] < 0.5 * losses[0]
    assert accuracy(logits(model, few.images), few) > 80


def test_refocused_network_trains_with_its_basis_frozen(few: MemoryImages) -> None:
    model = refocus(network())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, few, RECIPE, seed=0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.endswith("basis_weight"), name


def test_a_diverged_training_says_so(few: MemoryImages) -> None:
    broken = MemoryImages(few.images * math.nan, few.labels)
    with pytest.raises(Diverged, match="the loss is nan in epoch 1: lower the learning rate"):
        train(network(), broken, RECIPE, seed=0)


def test_logits_and_accuracy() -> None:
    data = MemoryImages(torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 2, 2]))
    assert accuracy(torch.eye(3)[[0, 1, 2, 0]], data) == 75.0
    model = network().train()
    answer = logits(model, torch.rand(4, 1, 8, 8))
    assert answer.shape == (4, 10)
    assert not answer.requires_grad
    assert not model.training


def test_steps_are_timed_in_turns() -> None:
    calls: list[str] = []
    times = step_times({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * (len(calls) // 2)
    assert list(times) == ["a", "b"]
    assert all(len(ms) == 3 and min(ms) >= 0 for ms in times.values())


def test_comparing_steps_leaves_the_network_alone(few: MemoryImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "step_times", lambda steps: step_times(steps, rounds=2))
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
    monkeypatch.setattr(loop, "use_backend", wrong)
    monkeypatch.setattr(loop, "step_times", lambda _: pytest.fail("timed"))
    with pytest.raises(CheckFailed, match=r"in torch.float64, loss and gradients .* differ from those of two"):
        compare_steps(network(), few, RECIPE)
