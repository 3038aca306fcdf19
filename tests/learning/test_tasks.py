"""One training in its folder: what it leaves, that it goes on to the same bits, and what it refuses."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from refconv_kernels import refocus
from refconv_kernels.learning import checkpoint, loop, tasks
from refconv_kernels.learning.data import Data, MemoryImages, digits
from refconv_kernels.learning.errors import CheckFailed, CheckpointError, Diverged, SettingsError
from refconv_kernels.learning.models import build
from refconv_kernels.learning.recipe import Recipe
from refconv_kernels.learning.settings import Settings
from refconv_kernels.learning.signals import Stopped, Watch
from refconv_kernels.learning.tasks import Task, run_task

RECIPE = Recipe(epochs=3, warmup_epochs=1, batch_size=25)
SETTINGS = Settings(recipe=RECIPE, form="thin", evaluate_every=2, threads=1)


@pytest.fixture(autouse=True)
def _few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_data", lambda *_: Data("digits", *digits(100)))


def task(folder: Path, arm: str = "baseline", **changes: Any) -> Task:
    start = None if arm == "baseline" else folder / "baseline"
    return Task(folder / arm, replace(SETTINGS, **changes), arm, start)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in which a baseline and a RefConv network were trained."""
    folder = tmp_path_factory.mktemp("run")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "_data", lambda *_: Data("digits", *digits(100)))
        for arm in ("baseline", "refconv"):
            run_task(task(folder, arm))
    torch.set_num_threads(threads)
    return folder


def test_what_a_training_leaves(done: Path) -> None:
    folder = done / "refconv"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        ".lock", "checkpoint.safetensors", "curves.png", "folded.safetensors", "log.csv", "log.jsonl", "result.json",
    }  # fmt: skip
    result = json.loads((folder / "result.json").read_text())
    with (folder / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines == result["history"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["accuracy"] != "" for row in rows] == [False, True, True]  # every second epoch, and the last
    assert float(rows[2]["accuracy"]) == result["accuracy"] == lines[2]["accuracy"]
    assert result["training_parameters"] == result["deployed_parameters"] == 24810  # the thin form
    assert result["settings"]["recipe.epochs"] == 3
    assert (result["shape"], len(result["classes"]), result["images"]) == ([1, 8, 8], 10, 100)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_folded_weights_are_what_was_evaluated(done: Path) -> None:
    result = json.loads((done / "refconv" / "result.json").read_text())
    model = build("small", 1, 10)
    model.load_state_dict(checkpoint.read_weights(done / "refconv" / "folded.safetensors")[0])
    test = digits(100)[1]
    shown = (test.images - torch.tensor(result["mean"])) / torch.tensor(result["std"])
    assert loop.accuracy(loop.logits(model, shown), test) == pytest.approx(result["accuracy"], abs=0.1)


def test_a_training_that_is_done_is_not_done_again(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "Training", lambda *_, **__: pytest.fail("trained"))
    expected = json.loads((done / "refconv" / "result.json").read_text())
    assert run_task(task(done, "refconv")) == expected
    with pytest.raises(CheckpointError, match=r"result.json belongs to a run with other settings: seed was 0, is 1"):
        run_task(task(done, "refconv", seed=1))


class StopAt(Watch):
    """Is asked to stop at the ``n``-th question."""

    def __init__(self, n: int) -> None:
        self.left = n

    @property
    def asked(self) -> int | None:  # type: ignore[override]
        self.left -= 1
        return 15 if self.left < 0 else None


def same(first: Path, second: Path) -> bool:
    ours, theirs = checkpoint.read(first).tensors, checkpoint.read(second).tensors
    return set(ours) == set(theirs) and all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.parametrize("arm", ["baseline", "refconv"])
@pytest.mark.parametrize("step", [0, 4, 5, 13])  # first step, last of an epoch, first of the next, last but one of all
def test_it_goes_on_to_the_same_bits(done: Path, tmp_path: Path, arm: str, step: int) -> None:
    interrupted = task(tmp_path, arm)
    if arm == "refconv":
        interrupted = replace(interrupted, pretrained=done / "baseline")
    with pytest.raises(Stopped, match=r"stopped at epoch \d of 3, step \d of 4; all is saved, go on with --resume run"):
        run_task(interrupted, watch=StopAt(min(step, 10)))
    assert not (tmp_path / arm / "result.json").exists()
    result = run_task(interrupted)
    assert same(tmp_path / arm / "checkpoint.safetensors", done / arm / "checkpoint.safetensors")
    expected = json.loads((done / arm / "result.json").read_text())["history"]
    for entry in (*result["history"], *expected):
        del entry["seconds"]
    assert result["history"] == expected


def test_it_saves_within_an_epoch_when_it_is_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[tuple[int, int]] = []
    monkeypatch.setattr(checkpoint, "write", lambda path, made: saved.append((made.about["epoch"], made.about["step"])))
    monkeypatch.setattr(tasks, "_finish", lambda *_: {"done": True})
    run_task(task(tmp_path, checkpoint_minutes=1e-9))
    every = [(epoch, step) for epoch in range(3) for step in range(4)]
    assert sorted(set(saved)) == [*every, (3, 0)]
    saved.clear()
    run_task(task(tmp_path / "slow", checkpoint_minutes=60.0))
    assert saved == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_a_diverged_training_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = loop.Training.step

    def diverge(self: loop.Training) -> None:
        step(self)
        if self.epoch == 1:
            self._loss.fill_(torch.nan)

    monkeypatch.setattr(loop.Training, "step", diverge)
    with pytest.raises(Diverged, match="the loss is nan in epoch 2: lower the learning rate"):
        run_task(task(tmp_path))
    kept = checkpoint.read(tmp_path / "baseline" / "checkpoint.safetensors")
    assert (kept.about["epoch"], kept.about["step"]) == (1, 0)
    assert all(tensor.isfinite().all() for tensor in kept.part("model").values())


def test_a_full_disk_leaves_the_checkpoint_from_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    fill = checkpoint.write_file

    def full(path: Path, write: Callable[[Path], object]) -> None:
        written.append(path)
        if len(written) > 4:  # the first checkpoint, the second, two logs

            def no_room(to: Path) -> None:
                to.write_bytes(b"half")
                raise OSError(28, "No space left on device")

            fill(path, no_room)
        fill(path, write)

    monkeypatch.setattr(checkpoint, "write_file", full)
    monkeypatch.setattr(tasks.log, "write_file", full)
    with pytest.raises(
        CheckpointError, match=r"cannot write .*checkpoint.safetensors: No space left on device; the file"
    ):
        run_task(task(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(tasks, "_data", lambda *_: Data("digits", *digits(100)))
    assert checkpoint.read(tmp_path / "baseline" / "checkpoint.safetensors").about["epoch"] == 1
    assert {p.name for p in (tmp_path / "baseline").iterdir()} == {
        ".lock",
        "checkpoint.safetensors",
        "log.csv",
        "log.jsonl",
    }
    assert run_task(task(tmp_path))["accuracy"] > 0


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "baseline").mkdir()
    (tmp_path / "baseline" / ".checkpoint.safetensors.4711").write_bytes(b"half")
    run_task(task(tmp_path))
    assert not list((tmp_path / "baseline").glob(".*.4711"))


def test_two_processes_never_work_in_one_folder(tmp_path: Path) -> None:
    with (
        checkpoint.locked(tmp_path / "baseline"),
        pytest.raises(CheckpointError, match="another process is at work in .*baseline"),
    ):
        run_task(task(tmp_path))


def test_a_checkpoint_of_another_training_is_refused(done: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run_task(task(tmp_path), watch=StopAt(1))
    file = tmp_path / "baseline" / "checkpoint.safetensors"
    for change, message in (
        ({"recipe": replace(RECIPE, lr=0.2)}, "belongs to a run with other settings: recipe.lr was 0.1, is 0.2"),
        ({"model": "resnet20"}, "belongs to a run with other settings: model was 'small', is 'resnet20'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run_task(task(tmp_path, **change))
    with pytest.raises(CheckpointError, match="is of another training: arm was 'baseline', is 'retrain'"):
        run_task(replace(task(tmp_path), arm="retrain", pretrained=done / "baseline"))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="checkpoint.safetensors is damaged or no safetensors file"):
        run_task(task(tmp_path))
    assert file.read_bytes() == whole[: len(whole) // 2]  # nothing is thrown away


def test_free_settings_may_change(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run_task(task(tmp_path), watch=StopAt(1))
    assert run_task(task(tmp_path, threads=2, checkpoint_minutes=1.0))["accuracy"] > 0


def test_weights_that_do_not_fit_are_refused(done: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"baseline does not fit the model 'resnet20': Error\(s\) in loading"):
        run_task(replace(task(tmp_path, "retrain", model="resnet20"), pretrained=done / "baseline"))
    with pytest.raises(SettingsError, match=r"refconv'\) is a refocused network: fold it first"):
        run_task(replace(task(tmp_path, "retrain"), pretrained=done / "refconv"))
    with pytest.raises(CheckpointError, match="nowhere.pth does not exist"):
        run_task(replace(task(tmp_path, "retrain"), pretrained=Path("nowhere.pth")))


def test_a_baseline_with_weights_is_only_evaluated(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads((done / "baseline" / "result.json").read_text())
    monkeypatch.setattr(loop.Training, "step", lambda *_: pytest.fail("trained"))
    result = run_task(replace(task(tmp_path), pretrained=done / "baseline" / "folded.safetensors"))
    assert result["accuracy"] == before["accuracy"]
    assert [entry["epoch"] for entry in result["history"]] == [0]


def test_images_can_be_held_out(tmp_path: Path) -> None:
    result = run_task(replace(task(tmp_path), held_out=0.2))
    assert result["images"] == 80
    assert (result["accuracy"] / 5) == pytest.approx(round(result["accuracy"] / 5))  # of 20 images


def test_a_fold_that_is_wrong_is_an_error(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: torch.nn.Module) -> torch.nn.Module:
        return refocus(build("small", 1, 10))

    monkeypatch.setattr(tasks, "reparameterize", wrong)
    with pytest.raises(CheckFailed, match="folding changed the logits"):
        run_task(task(tmp_path))
    assert not (tmp_path / "baseline" / "result.json").exists()


def test_skipped_files_are_counted_and_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.undo()
    images = MemoryImages(torch.zeros(4, 1, 8, 8), torch.arange(4))
    found = Data("folder", images, images, tuple(f"file{n}: truncated" for n in range(12)))
    monkeypatch.setattr(tasks.sources, "load", lambda *_, **__: found)
    tasks._data.cache_clear()
    assert tasks._data("folder", None) is found
    tasks._data.cache_clear()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "left out: file0: truncated"
    assert lines[-1] == "left out 12 files that are no readable images; 8 are used"
    assert len(lines) == 11


@pytest.mark.parametrize(
    ("device", "message"), [("cuda:9", "device (='cuda:9') cannot be used"), ("tpu", "device (='tpu')")]
)
def test_a_device_that_is_not_there(device: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        tasks.prepare_torch(replace(SETTINGS, device=device))
    assert str(caught.value).startswith(message)
