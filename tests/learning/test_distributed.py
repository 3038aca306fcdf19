"""Two processes train the network that one would, by DDP and by FSDP2; what each of them sees and says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from refconv_kernels import refocus
from refconv_kernels.learning import checkpoint
from refconv_kernels.learning.data import MemoryImages
from refconv_kernels.learning.distributed import ALONE, Processes, SyncBatchNorm2d, joined, leave
from refconv_kernels.learning.errors import Diverged, SettingsError
from refconv_kernels.learning.loop import Training
from refconv_kernels.learning.models import SmallSeparableNet
from refconv_kernels.learning.recipe import Recipe

# 36 images in batches of 10: the last has 6, and with accumulation the parts are unequal.
RECIPE = Recipe(epochs=2, warmup_epochs=1, batch_size=10, lr=0.05, label_smoothing=0.1, clip_norm=0.5, ema=0.5)


class Double(nn.Module):
    """Sees float64 images, so that a difference between orders of summation is far below one of substance."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.double())


def network(form: str) -> nn.Module:
    torch.manual_seed(0)
    plain = SmallSeparableNet(widths=(4, 8, 12))
    return Double(plain if form == "plain" else refocus(plain, form=form))


def images() -> MemoryImages:
    generator = torch.Generator().manual_seed(3)
    return MemoryImages(torch.rand(36, 1, 8, 8, generator=generator), torch.arange(36) % 10)


def training(form: str, processes: Processes, recipe: Recipe = RECIPE) -> Training:
    return Training(network(form), images(), recipe, seed=1, mean=[0.5], std=[0.3], processes=processes)


def finish(now: Training) -> None:
    while not now.finished:
        now.step()
        if now.epoch_is_over:
            now.end_epoch(accuracy=now.evaluate(images())[0])


FORMS = ("plain", "full", "thin")


def worker(rank: int, folder: str, parallel: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    processes = Processes(rank, 2, parallel)
    for form in FORMS:
        first = training(form, processes)
        for _ in range(3):
            first.step()
        half = copy.deepcopy(first.checkpoint())  # in the middle of an epoch; every process has its part in it
        finish(first)
        second = training(form, processes)
        second.load(half)
        finish(second)
        for name, one in (("through", first), ("resumed", second)):
            made = one.checkpoint()
            if rank == 0:
                checkpoint.write(Path(folder) / f"{form}-{name}.safetensors", made)
    leave()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_like_one(tmp_path: Path, parallel: str) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path), parallel), nprocs=2)
    for form in FORMS:
        alone = training(form, ALONE)
        finish(alone)
        expected = alone.checkpoint()
        for name in ("through", "resumed"):
            found = checkpoint.read(tmp_path / f"{form}-{name}.safetensors")
            assert set(found.tensors) == set(expected.tensors)
            for key, tensor in expected.tensors.items():
                if key != "state.random":
                    torch.testing.assert_close(found.tensors[key], tensor, rtol=1e-9, atol=1e-11)
            for ours, theirs in zip(found.about["history"], expected.about["history"], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-9)


def diverging_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    now = training("plain", Processes(rank, 2))
    if rank == 1:
        now._loss.fill_(torch.nan)  # what one process sees, all of them hear
    with pytest.raises(Diverged, match="the loss is nan in epoch 1"):
        now.checkpoint()
    leave()


def test_a_loss_that_diverges_in_one_process_stops_all(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(diverging_worker, (str(tmp_path),), nprocs=2)


def accumulating_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    now = training("thin", Processes(rank, 2), Recipe(epochs=1, warmup_epochs=0, batch_size=12, accumulation=3))
    # Without BatchNorm the parts of a batch are independent, so their number must not matter.
    now.model.eval()
    now.model.train = lambda mode=True: now.model  # type: ignore[method-assign,assignment,misc]
    finish(now)
    made = now.checkpoint()
    if rank == 0:
        checkpoint.write(Path(folder) / "made.safetensors", made)
    leave()


def test_accumulation_in_two_processes_is_the_whole_batch_in_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(accumulating_worker, (str(tmp_path),), nprocs=2)
    alone = training("thin", ALONE, Recipe(epochs=1, warmup_epochs=0, batch_size=12))
    alone.model.eval()
    alone.model.train = lambda mode=True: alone.model  # type: ignore[method-assign,assignment,misc]
    finish(alone)
    found = checkpoint.read(tmp_path / "made.safetensors").part("model")
    for key, tensor in alone.checkpoint().part("model").items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-9, atol=1e-11)


def batch_norm_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=generator) * 3 + 1
    part = x.tensor_split(2)[rank]
    options: dict[str, Any]
    for options in ({}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}):
        plain = nn.BatchNorm2d(3, dtype=torch.float64, **options)
        ours = SyncBatchNorm2d(3, dtype=torch.float64, **options)
        for _ in range(2):
            whole, mine = x.clone().requires_grad_(), part.clone().requires_grad_()
            expected, found = plain(whole), ours(mine)
        (expected * x.sin()).sum().backward()
        (found * part.sin()).sum().backward()
        torch.testing.assert_close(found, expected.tensor_split(2)[rank])
        assert whole.grad is not None
        torch.testing.assert_close(mine.grad, whole.grad.tensor_split(2)[rank])
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(ours.get_buffer(name), buffer)
        if plain.affine:
            total = ours.weight.grad.clone()
            dist.all_reduce(total)
            torch.testing.assert_close(total, plain.weight.grad)
        if plain.track_running_stats:
            torch.testing.assert_close(ours.eval()(part), plain.eval()(part))
    leave()


def test_batch_norm_sees_the_batches_of_all(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(batch_norm_worker, (str(tmp_path),), nprocs=2)


def test_a_batch_is_shared_out_in_order() -> None:
    rows = torch.arange(7)
    parts = [Processes(rank, 3).share(rows) for rank in range(3)]
    assert [len(part) for part in parts] == [3, 2, 2]
    assert torch.equal(torch.cat(parts), rows)


def test_a_batch_too_small_for_all_is_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"batch_size \(=35\) leaves 1 of 36 images for the last batch .* the 2 parts"
    ):
        training("plain", Processes(0, 2), Recipe(batch_size=35))


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("ddp", torch.device("cpu")) as processes:
        assert processes == ALONE
    with (
        pytest.raises(SettingsError, match=r"parallel \(='tensor'\) must be one of"),
        joined("tensor", torch.device("cpu")),
    ):
        pass
