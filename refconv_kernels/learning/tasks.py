"""One training in one folder, which can be left at any moment and gone on with."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from refconv_kernels import reparameterize, summary
from refconv_kernels.learning import checkpoint, log, models
from refconv_kernels.learning import data as sources
from refconv_kernels.learning import settings as options
from refconv_kernels.learning.arms import ARMS
from refconv_kernels.learning.checkpoint import Checkpoint
from refconv_kernels.learning.distributed import ALONE, Processes
from refconv_kernels.learning.errors import CheckpointError, SettingsError
from refconv_kernels.learning.fold import check_fold
from refconv_kernels.learning.loop import Training
from refconv_kernels.learning.picture import draw_curves
from refconv_kernels.learning.settings import Settings
from refconv_kernels.learning.signals import Stopped, Watch

__all__ = ["Task", "prepare_torch", "run_task", "starting_network"]

CHECKPOINT, RESULT, FOLDED = "checkpoint.safetensors", "result.json", "folded.safetensors"
_ASKED_EVERY = 10  # steps between the questions of several processes whether to stop or to save
_CHECKED = 256  # test images on which the folded network is compared


@dataclass(frozen=True)
class Task:
    """One training: everything that decides its result, and where it is kept.

    Args:
        directory: its folder.
        settings: of the run; ``settings.seed`` is that of this training.
        arm: name of the arm.
        pretrained: weights to start from; None for random ones. A baseline with weights is only evaluated.
        tuned: learning rate for the arm ``retrain-tuned``.
        held_out: share of the training images that is evaluated instead of the test images, and not trained on.
    """

    directory: Path
    settings: Settings
    arm: str
    pretrained: Path | None = None
    tuned: float | None = None
    held_out: float | None = None

    @property
    def about(self) -> dict[str, Any]:
        """What must not differ when this training goes on."""
        return {"arm": self.arm, "tuned": self.tuned, "held_out": self.held_out}


def prepare_torch(settings: Settings) -> torch.device:
    """Set the number of threads; the device to train on."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    try:
        device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"device (={settings.device!r}) cannot be used: {str(error).splitlines()[0]}") from error
    return device


@functools.lru_cache(maxsize=1)
def _data(source: str, image_size: int | None) -> sources.Data:
    loaded = sources.load(source, image_size=image_size)
    for line in loaded.skipped[:10]:
        print(f"left out: {line}", file=sys.stderr)
    if loaded.skipped:
        count, used = len(loaded.skipped), len(loaded.train) + len(loaded.test)
        print(f"left out {count} files that are no readable images; {used} are used", file=sys.stderr)
    return loaded


def run_task(
    task: Task, *, processes: Processes = ALONE, watch: Watch | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Do one training, or go on with it, or read its result if it is done; see :func:`learn` for what it writes.

    Raises:
        LearningError: as :func:`learn`.
        Stopped: ``watch`` was asked to stop; everything is saved.
    """
    done = task.directory / RESULT
    if done.exists():
        return _known_result(task, done)
    with checkpoint.locked(task.directory) if processes.rank == 0 else nullcontext():
        result = _train(task, processes, Watch() if watch is None else watch, quiet)
    processes.wait()
    return result or _known_result(task, done)


def _train(task: Task, processes: Processes, watch: Watch, quiet: bool) -> dict[str, Any]:
    """Do a training, or go on with it; the result, empty in all processes but the first."""
    settings, arm = task.settings, ARMS[task.arm]
    loaded = _data(settings.data, settings.image_size)
    images, test = loaded.train, loaded.test
    if task.held_out is not None:
        images, test = sources.hold_out(images, task.held_out)
    measured = sources.statistics(images) if settings.mean is None else (settings.mean, settings.std)
    model = starting_network(task, images)
    training = Training(
        model,
        images,
        arm.recipe(settings.recipe, task.tuned),
        seed=2 * settings.seed + (task.arm != "baseline"),  # the same order for all second trainings
        mean=measured[0],
        std=measured[1],
        device=prepare_torch(settings),
        precision=settings.precision,
        channels_last=settings.channels_last,
        compiled=settings.compile,
        processes=processes,
    )
    about = {
        **task.about,
        "settings": options.flat(settings),
        "classes": list(images.classes),
        "shape": list(images.shape),
        "mean": measured[0],
        "std": measured[1],
        "data": loaded.name,
        "images": len(images),
    }
    file = task.directory / CHECKPOINT
    if file.exists():
        _load(training, task, file)
    processes.wait()
    if processes.rank == 0:
        checkpoint.remove_leftovers(task.directory)
    if task.arm == "baseline" and task.pretrained is not None:
        training.skip()  # it is trained: it is only evaluated
    title = f"{task.directory.parent.name}/{task.directory.name}"
    keep = _Keeper(training, task.directory, about, settings.checkpoint_minutes, processes)
    keep.save()  # whatever comes, there is one; and what cannot be written is known now
    total = training.steps * training.recipe.epochs
    if training.finished and not training.history:
        right, loss = training.evaluate(test)
        training.history = [{"epoch": 0, "loss": None, "lr": 0.0, "seconds": 0.0, "accuracy": right, "test_loss": loss}]
    with log.progress(title, total, training.epoch * training.steps + training.step_in_epoch, quiet=quiet) as shown:
        start = time.perf_counter()
        while not training.finished:
            training.step()
            shown.step()
            if training.epoch_is_over:
                seconds = time.perf_counter() - start
                last = training.epoch + 1 == training.recipe.epochs
                figures: dict[str, Any] = {"seconds": round(seconds, 3), "accuracy": None, "test_loss": None}
                if last or (training.epoch + 1) % settings.evaluate_every == 0:
                    figures["accuracy"], figures["test_loss"] = training.evaluate(test)
                shown.epoch(training.end_epoch(**figures))
                keep.save()
                start = time.perf_counter()
            keep.attend(watch)
    return _finish(task, training, about, test) if processes.rank == 0 else {}


def _known_result(task: Task, file: Path) -> dict[str, Any]:
    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged ({error}): delete it, and it is made again") from error
    _same_task(task, result, file)
    return result


def starting_network(task: Task, images: sources.ImageSet) -> nn.Module:
    """The network of a task before its training."""
    settings, classes = task.settings, len(images.classes)
    torch.manual_seed(settings.seed)
    model = models.build(settings.model, images.shape[0], classes)
    if task.pretrained is not None:
        weights, about = checkpoint.read_weights(task.pretrained)
        if about and ARMS[about["arm"]].refocused:
            raise SettingsError(f"pretrained (={str(task.pretrained)!r}) is a refocused network: fold it first")
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"{task.pretrained} does not fit the model {settings.model!r}: {error}") from error
    return ARMS[task.arm].start(model, form=settings.form, init=settings.init, map_size=settings.map_size)


class _Keeper:
    """Saves a training after every epoch, every few minutes, and when it is asked to stop."""

    def __init__(
        self, training: Training, directory: Path, about: Mapping[str, Any], minutes: float, processes: Processes
    ) -> None:
        self.training, self.directory, self.about, self.processes = training, directory, about, processes
        self.interval, self.saved = 60 * minutes, time.monotonic()

    def save(self) -> None:
        made = self.training.checkpoint()  # every process has its part
        if self.processes.rank == 0:
            whole = Checkpoint(made.tensors, {**self.about, **made.about})
            checkpoint.write(self.directory / CHECKPOINT, whole)
            if self.training.history:
                log.write_logs(self.directory, self.training.history)
        self.saved = time.monotonic()

    def attend(self, watch: Watch) -> None:
        """Save if it is time; save and raise :class:`Stopped` if ``watch`` says so. All processes decide as one."""
        training = self.training
        if self.processes.size > 1 and training.step_in_epoch % _ASKED_EVERY != 0:
            return
        stop = self.processes.any(watch.asked is not None, training.device)
        due = self.processes.any(time.monotonic() - self.saved > self.interval, training.device)
        if stop or due:
            self.save()
        if stop and not training.finished:
            where = f"epoch {training.epoch + 1} of {training.recipe.epochs}, step {training.step_in_epoch}"
            run = self.about["settings"]["output"]
            text = f"stopped at {where} of {training.steps}; all is saved, go on with --resume {run}"
            raise Stopped(text, watch.asked or 15)


def _load(training: Training, task: Task, file: Path) -> None:
    found = checkpoint.read(file)
    _same_task(task, found.about, file)
    try:
        training.load(found)
    except CheckpointError as error:
        raise CheckpointError(f"{file} cannot be gone on with: {error}") from error


def _same_task(task: Task, about: Mapping[str, Any], file: Path) -> None:
    for name, value in task.about.items():
        if about.get(name) != value:
            raise CheckpointError(f"{file} is of another training: {name} was {about.get(name)!r}, is {value!r}")
    options.check_same(about.get("settings", {}), task.settings, file)


def _finish(task: Task, training: Training, about: dict[str, Any], test: sources.ImageSet) -> dict[str, Any]:
    """Fold what was saved, check it, and write down what came of the training."""
    refocused = starting_network(task, test)
    refocused.load_state_dict(checkpoint.read(task.directory / CHECKPOINT).weights)
    counts, plain = summary(refocused), reparameterize(refocused)
    result: dict[str, Any] = {
        **about,
        "accuracy": training.history[-1]["accuracy"],
        "test_loss": training.history[-1]["test_loss"],
        "training_parameters": counts.training_parameters,
        "deployed_parameters": counts.deployed_parameters,
        "lr": training.recipe.lr,
        "seconds": round(sum(entry["seconds"] for entry in training.history), 3),
        "fold_difference": check_fold(refocused, plain, test.take(torch.arange(min(_CHECKED, len(test))))),
        "history": training.history,
    }
    checkpoint.write_weights(task.directory / FOLDED, plain.state_dict())
    draw_curves({task.arm: training.history}, task.directory / "curves.png")
    log.write_json(task.directory / RESULT, result)
    return result
