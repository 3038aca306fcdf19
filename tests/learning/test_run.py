"""``learn`` from start to end: a killed process, signals, several processes, and folders that hold something else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from refconv_kernels.learning import checkpoint
from refconv_kernels.learning.errors import CheckpointError, SettingsError
from refconv_kernels.learning.recipe import Recipe
from refconv_kernels.learning.run import learn
from refconv_kernels.learning.settings import Settings

QUICK = ["--epochs", "3", "--warmup-epochs", "1", "--batch-size", "50", "--form", "thin", "--threads", "1"]
LEARN = [sys.executable, "-m", "refconv_kernels", "learn"]
FILES = ("baseline/checkpoint", "baseline/folded", "refconv/checkpoint", "refconv/folded")


def settings(output: Path) -> Settings:
    return Settings(output=str(output), form="thin", threads=1, recipe=Recipe(epochs=3, warmup_epochs=1, batch_size=50))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("done") / "run"
    threads = torch.get_num_threads()
    learn(settings(folder))
    torch.set_num_threads(threads)
    return folder


def assert_same(first: Path, second: Path) -> None:
    for name in FILES:
        ours, theirs = (checkpoint._read_safetensors(run / f"{name}.safetensors")[0] for run in (first, second))
        assert set(ours) == set(theirs)
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items()), name


def wait_for(ready: Callable[[], bool], process: subprocess.Popen) -> None:
    limit = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, "the run ended before it could be disturbed"
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_a_run_says_what_is_needed_to_repeat_it(done: Path) -> None:
    (found,) = json.loads((done / "environment.json").read_text())
    assert found["torch"] == torch.__version__
    assert found["command"] == sys.argv
    assert {"commit", "cpu", "threads", "platform", "python", "processes"} <= set(found)
    assert Settings.__dataclass_fields__.keys() >= {"data", "model", "seed"}
    assert (done / "settings.toml").read_text().startswith(f'output = "{done}"\ndata = "digits"\n')
    result = json.loads((done / "refconv" / "result.json").read_text())
    assert result["accuracy"] > 15  # more than chance


@pytest.mark.parametrize("killed_in", ["baseline", "refconv"])
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(done: Path, tmp_path: Path, killed_in: str) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [*LEARN, *QUICK, "--output", str(run), "--checkpoint-minutes", "1e-9"], stdout=subprocess.PIPE
    )
    wait_for((run / killed_in / "log.csv").exists, process)  # the first epoch is over
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = checkpoint.read(run / killed_in / "checkpoint.safetensors")  # loadable, whatever the moment was
    assert kept.about["epoch"] >= 1
    subprocess.run([*LEARN, "--resume", str(run)], check=True, stdout=subprocess.PIPE)
    assert_same(run, done)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_ends_with_one_line(done: Path, tmp_path: Path, number: int, code: int) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [*LEARN, *QUICK, "--output", str(run)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for((run / "baseline" / "log.csv").exists, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("stopped at epoch ")
    assert line.endswith(f"all is saved, go on with --resume {run}")
    subprocess.run([*LEARN, "--resume", str(run)], check=True, stdout=subprocess.PIPE)
    assert_same(run, done)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_do_the_run_of_one(done: Path, tmp_path: Path, parallel: str) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["refconv_kernels", "learn", *QUICK, "--output", str(run), "--parallel", parallel]
    ran = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("test accuracy after the last epoch") == 1  # rank 0 alone speaks
    ours, theirs = (json.loads((r / "baseline" / "result.json").read_text()) for r in (run, done))
    # The same to rounding, which a few steps of float32 with BatchNorm make larger; float64 is in test_distributed.
    assert ours["history"][0]["loss"] == pytest.approx(theirs["history"][0]["loss"], rel=1e-3)
    assert set(checkpoint.read(run / "refconv" / "checkpoint.safetensors").tensors) == set(
        checkpoint.read(done / "refconv" / "checkpoint.safetensors").tensors
    )
    (start,) = json.loads((run / "environment.json").read_text())
    assert start["processes"] == 2


def test_folders_that_hold_something_else(done: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=f"{done} holds a run: go on with --resume {done}, or choose another --output"
    ):
        learn(settings(done))
    with pytest.raises(SettingsError, match="holds no run to go on with"):
        learn(settings(tmp_path), resume=True)
    with pytest.raises(CheckpointError, match="other settings: seed was 0, is 5"):
        learn(replace(settings(done), seed=5), resume=True)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(CheckpointError, match=f"cannot use {file} as a folder"):
        learn(settings(file))
    assert file.read_text() == "mine"


def test_a_run_that_is_done_is_told_again(done: Path) -> None:
    result = learn(settings(done), resume=True)
    assert result["accuracy"] == json.loads((done / "refconv" / "result.json").read_text())["accuracy"]
    assert len(json.loads((done / "environment.json").read_text())) == 2  # every start is told
    assert result["baseline_accuracy"] == json.loads((done / "baseline" / "result.json").read_text())["accuracy"]


def test_a_folder_of_photographs_with_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "test"):
        for name, level in (("dark", 40), ("light", 200)):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for n in range(8):
                pixels = (torch.randint(-30, 30, (24, 20, 3), generator=generator) + level).to(torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{n}.png")
    whole = (tmp_path / "photos" / "train" / "dark" / "0.png").read_bytes()
    (tmp_path / "photos" / "train" / "dark" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "photos" / "train" / "light" / "notes.txt").write_text("not an image")
    chosen = replace(settings(tmp_path / "run"), data=str(tmp_path / "photos"), image_size=16, arm="retrain")
    result = learn(replace(chosen, recipe=Recipe(epochs=2, warmup_epochs=0, batch_size=4, lr=0.05)))
    assert (result["images"], result["shape"], result["classes"]) == (16, [3, 16, 16], ["dark", "light"])
    err = capsys.readouterr().err
    assert "cut.png" in err
    assert "left out 2 files that are no readable images; 32 are used" in err
