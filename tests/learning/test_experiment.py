"""``learn compare``: paired arms, a learning rate chosen without the test images, processes side by side."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from refconv_kernels.learning import checkpoint, experiment, tasks
from refconv_kernels.learning.arms import ARMS
from refconv_kernels.learning.data import Data, digits
from refconv_kernels.learning.errors import CheckpointError, SettingsError
from refconv_kernels.learning.experiment import report, run_comparison
from refconv_kernels.learning.recipe import Recipe
from refconv_kernels.learning.settings import Comparison, Settings

RECIPE = Recipe(epochs=2, warmup_epochs=1, batch_size=25)


@pytest.fixture(autouse=True)
def _few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_data", lambda *_: Data("digits", *digits(100)))


def settings(output: Path, *arms: str, **compare: Any) -> Settings:
    return Settings(output=str(output), threads=1, recipe=RECIPE, compare=Comparison(arms=arms, **compare))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("compare") / "run"
    chosen = settings(folder, "retrain", "retrain-tuned", "refconv", "zero", seeds=2, rates=(0.1, 1e-6))
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "_data", lambda *_: Data("digits", *digits(100)))
        summary = run_comparison(chosen)
    torch.set_num_threads(threads)
    return folder, summary


def result(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name / "result.json").read_text())


def test_figures_are_those_of_the_trainings(done: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = done
    assert list(summary["arms"]) == ["baseline", "retrain", "retrain-tuned", "refconv", "zero"]
    for arm, entry in summary["arms"].items():
        each = [result(folder, f"seed{seed}/{arm}")["accuracy"] for seed in (0, 1)]
        assert entry["accuracy"] == each
        assert entry["accuracy_mean"] == pytest.approx(sum(each) / 2)
    found = {(d["arm"], d["minus"]): d["mean"] for d in summary["differences"]}
    controls = ("baseline", "retrain", "retrain-tuned")
    expected = {(arm, c) for arm in ("refconv", "zero") for c in controls} | {(c, "baseline") for c in controls[1:]}
    assert set(found) == expected
    for (arm, control), mean in found.items():
        pairs = zip(summary["arms"][arm]["accuracy"], summary["arms"][control]["accuracy"], strict=True)
        assert mean == pytest.approx(sum(a - b for a, b in pairs) / 2)
    assert json.loads((folder / "comparison.json").read_text()) == summary
    assert (folder / "comparison.txt").read_text() == report(summary) + "\n"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_arms_of_a_seed_start_from_its_baseline(done: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = done
    for seed in (0, 1):
        base, zero = (
            checkpoint.read(folder / f"seed{seed}/{arm}/checkpoint.safetensors") for arm in ("baseline", "zero")
        )
        weights = base.part("model")
        for name, tensor in zero.part("model").items():
            if name.endswith("basis_weight"):
                assert torch.equal(tensor, weights[name.replace("basis_weight", "weight")])
    first, second = (
        checkpoint.read(folder / f"seed{seed}/baseline/checkpoint.safetensors").part("model") for seed in (0, 1)
    )
    assert not torch.equal(first["stem.0.weight"], second["stem.0.weight"])


def test_the_rate_is_chosen_on_held_out_images(done: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = done
    assert [rate["lr"] for rate in summary["tuning"]["retrain-tuned"]["rates"]] == [0.1, 1e-6]
    best = max(summary["tuning"]["retrain-tuned"]["rates"], key=lambda rate: rate["held_out_accuracy"])
    assert summary["tuning"]["retrain-tuned"]["chosen"] == best["lr"]
    assert summary["arms"]["retrain-tuned"]["lr"] == best["lr"]
    for name in ("baseline", "retrain-tuned-0.1", "retrain-tuned-1e-06"):
        tried = result(folder / "tuning", name)
        assert (tried["held_out"], tried["images"]) == (0.1, 90)
    assert result(folder, "seed0/retrain-tuned")["images"] == 100


def test_the_same_rate_gives_the_same_network(done: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = done
    assert summary["tuning"]["retrain-tuned"]["chosen"] == 0.1  # 1e-6 leaves the network as it is
    first, second = (
        checkpoint.read(folder / f"seed1/{arm}/checkpoint.safetensors").part("model")
        for arm in ("retrain", "retrain-tuned")
    )
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_the_text(done: tuple[Path, dict[str, Any]]) -> None:
    _, summary = done
    lines = report(summary).splitlines()
    assert lines[0] == "digits: 100 training images; model small, 2 epochs each, 2 seeds, form full."
    for arm, entry in summary["arms"].items():
        line = next(line for line in lines if line.split()[:1] == [arm])
        assert f"{entry['training_parameters']:,}" in line
        assert line.endswith("  ".join(f"{value:.2f}" for value in entry["accuracy"]))
    assert sum(" - " in line for line in lines) == 8
    assert "(8 intervals: by chance alone one in twenty excludes zero.)" in lines
    assert lines[-1].startswith("learning rate of retrain-tuned, by accuracy on held-out training images (0.1: ")


def test_it_is_told_again_without_training(
    done: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, summary = done
    monkeypatch.setattr(tasks, "Training", lambda *_, **__: pytest.fail("trained"))
    chosen = settings(folder, "retrain", "retrain-tuned", "refconv", "zero", seeds=2, rates=(0.1, 1e-6))
    assert run_comparison(chosen, resume=True) == summary
    fewer = replace(chosen, compare=replace(chosen.compare, seeds=1, arms=("refconv",)))
    assert list(run_comparison(fewer, resume=True)["arms"]) == ["baseline", "refconv"]  # and more can be added later


def test_weights_given_serve_every_seed(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = done
    start = folder / "seed0" / "baseline" / "folded.safetensors"
    chosen = replace(settings(tmp_path / "run", "finetune", "refconv", seeds=2), pretrained=str(start))
    summary = run_comparison(chosen)
    assert summary["arms"]["baseline"]["accuracy"] == [result(folder, "seed0/baseline")["accuracy"]] * 2
    assert summary["arms"]["finetune"]["lr"] == 1e-4


def test_all_arms_of_the_paper_run(tmp_path: Path) -> None:
    summary = run_comparison(settings(tmp_path / "run", *(arm for arm in ARMS if not arm.endswith("-tuned")), seeds=1))
    assert set(summary["arms"]) == set(ARMS) - {"retrain-tuned", "refconv-tuned"}
    assert {entry["deployed_parameters"] for entry in summary["arms"].values()} == {24810}
    assert all(d["low"] is None for d in summary["differences"])  # one seed gives no interval


def test_processes_side_by_side_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the processes know nothing of it
    chosen = replace(settings(tmp_path / "1", "refconv", seeds=2), recipe=replace(RECIPE, batch_size=100))
    side_by_side = replace(chosen, output=str(tmp_path / "2"), compare=replace(chosen.compare, jobs=2))
    first, second = run_comparison(chosen), run_comparison(side_by_side)
    assert [entry["accuracy"] for entry in first["arms"].values()] == [
        entry["accuracy"] for entry in second["arms"].values()
    ]
    assert first["differences"] == second["differences"]


def test_a_signal_stops_all_processes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "refconv_kernels", "learn", "compare", "--output", str(run), "--jobs", "2"]
    command += ["--epochs", "3000", "--threads", "1", "--seeds", "3", "--batch-size", "50"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        limit = time.monotonic() + 120
        while sum((run / f"seed{n}" / "baseline" / "log.csv").exists() for n in range(3)) < 2:
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)  # to the first process alone: it tells the others
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, "")
    assert err.splitlines()[-1] == f"stopped; all is saved, go on with --resume {run}"
    for n in (0, 1):
        assert checkpoint.read(run / f"seed{n}" / "baseline" / "checkpoint.safetensors").about["epoch"] >= 1
        with checkpoint.locked(run / f"seed{n}" / "baseline"):
            pass  # nobody is at work there any more


def test_what_cannot_be_is_known_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "run_task", lambda *_, **__: pytest.fail("trained"))
    for change, message in (
        ({"model": "resnet"}, r"model \(='resnet'\) must be one of"),
        ({"map_size": 5}, "no convolution to refocus"),
        ({"model": "torch.nn:Linear"}, r"model \(='torch.nn:Linear'\) cannot be built"),
    ):
        with pytest.raises(SettingsError, match=message):
            run_comparison(replace(settings(tmp_path / "run", "refconv"), **change))  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_the_thin_form_is_for_the_arms_that_can_have_it(tmp_path: Path) -> None:
    summary = run_comparison(replace(settings(tmp_path / "run", "refconv", "1b2l", seeds=1), form="thin"))
    assert summary["arms"]["refconv"]["training_parameters"] == 24810
    assert summary["arms"]["1b2l"]["training_parameters"] > 200_000


def test_an_error_in_one_process_stops_the_others_and_is_told(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "seed0" / "baseline").mkdir(parents=True)
    (run / "seed0" / "baseline" / "result.json").write_text("damaged")
    chosen = settings(run, "refconv", seeds=4, jobs=2)
    endless = replace(chosen, recipe=Recipe(epochs=100_000, batch_size=50))  # unless it is stopped
    with pytest.raises(CheckpointError, match=r"seed0.baseline.result.json is damaged .*: delete it"):
        run_comparison(endless)
    assert not (run / "seed3").exists()
