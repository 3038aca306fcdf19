"""The training loop: reproducible, paired, and it learns."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refconv_kernels import refocus
from refconv_kernels.learning.data import ImageSet, MemoryImages
from refconv_kernels.learning.errors import CheckpointError, Diverged, SettingsError
from refconv_kernels.learning.loop import Training, accuracy, logits, train
from refconv_kernels.learning.models import SmallSeparableNet
from refconv_kernels.learning.recipe import Recipe

RECIPE = Recipe(epochs=2, warmup_epochs=1, batch_size=32, crop_padding=1)


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


# --- the options of a training --------------------------------------------------------------------------------


class Dropping(nn.Module):
    """Draws from the global generator in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.dropout = network(), nn.Dropout(0.2)

    def forward(self, images: Tensor) -> Tensor:
        return self.dropout(self.network(images))


def finish(training: Training) -> Training:
    while not training.finished:
        training.step()
        if training.epoch_is_over:
            training.end_epoch()
    return training


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (RECIPE, {}),
        (Recipe(epochs=2, warmup_epochs=0, batch_size=32, ema=0.9, nesterov=True, clip_norm=1.0), {}),
        (RECIPE, {"precision": "bfloat16", "channels_last": True}),
        (RECIPE, {"precision": "float16"}),
    ],
)
def test_a_training_goes_on_to_the_same_bits(few: MemoryImages, recipe: Recipe, options: dict[str, Any]) -> None:
    def start() -> Training:
        torch.manual_seed(0)
        model = refocus(Dropping(), form="thin")
        return Training(model, few, recipe, seed=3, mean=[0.3], std=[0.3], **options)

    first = start()
    for _ in range(6):
        first.step()
        if first.epoch_is_over:
            first.end_epoch()
    half = copy.deepcopy(first.checkpoint())
    finish(first)
    second = start()
    torch.rand(7)  # the generator is somewhere else
    second.load(half)
    assert (second.epoch, second.step_in_epoch) == (1, 2)
    finish(second)
    expected, found = first.checkpoint(), second.checkpoint()
    assert set(found.tensors) == set(expected.tensors)
    assert all(torch.equal(found.tensors[key], tensor) for key, tensor in expected.tensors.items())
    assert found.about == expected.about


def test_a_checkpoint_of_another_network_is_refused(few: MemoryImages) -> None:
    other = Training(SmallSeparableNet(widths=(8, 16)), few, RECIPE, seed=0).checkpoint()
    training = Training(network(), few, RECIPE, seed=0)
    with pytest.raises(CheckpointError, match="it is of another network: blocks.1.* differs"):
        training.load(other)
    own = training.checkpoint()
    del own.tensors["state.loss"]
    with pytest.raises(CheckpointError, match="its state cannot be read"):
        training.load(own)


def test_accumulated_parts_give_the_gradient_of_the_batch(few: MemoryImages) -> None:
    weights = []
    for accumulation in (1, 3):
        torch.manual_seed(0)
        model = Linear().double()
        recipe = Recipe(epochs=1, warmup_epochs=0, batch_size=40, accumulation=accumulation, label_smoothing=0.2)
        finish(Training(_Wide(model), few, recipe, seed=0))
        weights.append(model.layer.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-12, atol=1e-14)


class _Wide(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.double())


def test_parts_that_cannot_be_are_refused(few: MemoryImages) -> None:
    with pytest.raises(SettingsError, match=r"batch_size \(=33\) leaves 1 of 100 images .* the 2 parts"):
        Training(network(), few, Recipe(batch_size=33, accumulation=2), seed=0)
    with pytest.raises(SettingsError, match="mean and std must be 1 numbers each"):
        Training(network(), few, RECIPE, seed=0, mean=[0.5] * 3, std=[0.5] * 3)


def test_clipping_bounds_the_step(few: MemoryImages) -> None:
    moved = []
    for clip in (None, 1e-3):
        model = network()
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        recipe = Recipe(epochs=1, warmup_epochs=0, batch_size=100, weight_decay=0.0, clip_norm=clip)
        Training(model, few, recipe, seed=0).step()
        moved.append((torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm().item())
    assert moved[1] == pytest.approx(1e-3 * 0.1, rel=1e-3)  # the norm of the gradient times the learning rate
    assert moved[0] > 10 * moved[1]


def test_the_average_is_what_is_evaluated_and_kept(few: MemoryImages) -> None:
    model = network()
    training = Training(model, few, Recipe(epochs=1, warmup_epochs=0, batch_size=25, ema=0.75), seed=0)
    seen = []
    for _ in range(4):
        training.step()
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
    expected = seen[0]
    for now in seen[1:]:
        expected = {name: 0.75 * expected[name] + 0.25 * value for name, value in now.items()}
    weights = training.checkpoint().weights
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value)
    averaged = network()
    averaged.load_state_dict(weights)
    assert training.evaluate(few)[0] == accuracy(logits(averaged, few.images), few)
    assert all(torch.equal(p, seen[-1][name]) for name, p in model.named_parameters())  # the network's own are back


def test_a_frozen_basis_is_not_averaged(few: MemoryImages) -> None:
    model = refocus(network())
    training = Training(model, few, Recipe(epochs=1, warmup_epochs=0, batch_size=50, ema=0.5), seed=0)
    training.step()
    training.step()
    names = set(training.checkpoint().part("average"))
    assert names
    assert not any("basis_weight" in name or "num_batches" in name for name in names)


def test_images_are_shown_as_asked(few: MemoryImages) -> None:
    model = Linear()
    recipe = Recipe(epochs=1, warmup_epochs=0, batch_size=100, crop_padding=0, flip=False)
    Training(model, few, recipe, seed=0, mean=[0.5], std=[0.25]).step()
    found = sorted(((model.seen[0] * 0.25 + 0.5) * 16).round().flatten(1).tolist())
    assert found == sorted((few.images * 16).flatten(1).tolist())


def test_crop_and_flip_are_of_the_data_where_the_recipe_is_silent() -> None:
    photographs = MemoryImages(torch.rand(4, 3, 32, 32), torch.arange(4), mirrored=True)
    drawings = MemoryImages(torch.rand(4, 1, 8, 8), torch.arange(4), mirrored=False)
    for data, padding, mirror in ((photographs, 4, True), (drawings, 1, False)):
        batches = Training(nn.Linear(1, 1), data, Recipe(batch_size=4), seed=0)._batches
        assert (batches.padding, batches.mirror) == (padding, mirror)


def test_images_that_are_decoded_come_in_the_same_batches(few: MemoryImages) -> None:
    class Decoded(ImageSet):
        labels, classes, shape, mirrored = few.labels, few.classes, few.shape, few.mirrored
        in_memory = False

        def take(self, rows: Tensor) -> Tensor:
            return few.take(rows)

        def subset(self, rows: Tensor) -> ImageSet:
            return few.subset(rows)

    states = [finish(Training(network(), data, RECIPE, seed=0)).model.state_dict() for data in (few, Decoded())]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_learns(few: MemoryImages, precision: str) -> None:
    seen: list[torch.dtype] = []
    model = refocus(network())
    model.blocks[0][1][0].register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))  # a 1x1 convolution
    recipe = Recipe(epochs=12, warmup_epochs=1, batch_size=10, crop_padding=0)
    training = finish(Training(model, few, recipe, seed=0, precision=precision, channels_last=True))
    assert set(seen) == {getattr(torch, precision)}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert training.history[-1]["loss"] < 0.5 * training.history[0]["loss"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_a_compiled_network_trains_the_same(few: MemoryImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    losses = []
    for compiled in (False, True):
        model = refocus(SmallSeparableNet(widths=(8, 16)))
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        training = Training(model, few, Recipe(epochs=1, warmup_epochs=0, batch_size=50), seed=0, compiled=compiled)
        losses.append(finish(training).history[-1]["loss"])
        assert set(training.model.state_dict()) == set(training.checkpoint().part("model"))  # no prefix in the names
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
