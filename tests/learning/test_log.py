"""Logs, the environment and progress."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from refconv_kernels import __version__
from refconv_kernels.learning import log
from refconv_kernels.learning.errors import CheckpointError, MissingExtra
from refconv_kernels.learning.log import cpu_name, environment, progress, write_json, write_logs
from refconv_kernels.ops import UNAVAILABLE

FIRST = {"epoch": 1, "loss": 2.5, "lr": 0.1, "seconds": 1.25, "accuracy": None, "test_loss": None}
SECOND = {"epoch": 2, "loss": 0.1 + 0.2, "lr": 1e-05, "seconds": 1.5, "accuracy": 97.5, "test_loss": 0.125}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_logs_have_a_line_per_epoch(tmp_path: Path) -> None:
    for history in ([FIRST], [FIRST, SECOND], [FIRST, SECOND]):  # written anew each time, nothing twice
        write_logs(tmp_path, history)
        lines = (tmp_path / "log.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == history
        with (tmp_path / "log.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [list(row) for row in rows] == [list(FIRST)] * len(history)
        for row, entry in zip(rows, history, strict=True):
            assert {key: None if value == "" else float(value) for key, value in row.items()} == entry
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "log.jsonl"]
    assert (tmp_path / "log.csv").read_bytes().count(b"\r") == 0


def test_columns_are_those_of_all_entries(tmp_path: Path) -> None:
    write_logs(tmp_path, [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "more": "a,b"}])
    assert (tmp_path / "log.csv").read_text() == 'epoch,loss,more\n1,2.0,\n2,,"a,b"\n'
    write_logs(tmp_path, [])
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_json_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, None], "ä": "ö"})
    assert json.loads(path.read_text()) == {"a": [1, None], "ä": "ö"}
    assert path.read_text().endswith("}\n")
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1, None], "ä": "ö"}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^cannot write .*log.csv: No such file or directory; nothing was left"):
        write_logs(tmp_path / "missing", [FIRST])
    with pytest.raises(CheckpointError, match=r"^cannot write .*a.json: No such file or directory; nothing was left"):
        write_json(tmp_path / "missing" / "a.json", {})


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["refconv", "learn", "--seed", "3"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    found = environment(torch.device("cpu"))
    assert json.loads(json.dumps(found)) == found
    assert found["command"] == ["refconv", "learn", "--seed", "3"]
    assert (found["refconv_kernels"], found["torch"]) == (__version__, torch.__version__)
    assert (found["device"], found["processes"]) == ("cpu", 1)
    assert found["threads"] == torch.get_num_threads()
    assert found["kernels_off"] == {name: reason for name, reason in UNAVAILABLE.items() if reason is not None}
    assert all(found[key] for key in ("date", "python", "platform", "cpu", "cores"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert environment(torch.device("cpu"))["processes"] == 4


def test_the_name_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor\t: 0\nmodel name\t: A: B 3\n\nprocessor\t: 1\nmodel name\t: other\n"
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert cpu_name() == "A: B 3"

    def missing(self: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(log.platform, "processor", lambda: "")
    monkeypatch.setattr(log.platform, "machine", lambda: "riscv64")
    assert cpu_name() == "riscv64"


def test_the_commit_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "refconv_kernels" / "learning"
    package.mkdir(parents=True)
    monkeypatch.setattr(log, "__file__", str(package / "log.py"))
    assert log._commit() is None  # installed: no checkout

    def git(*words: str) -> str:
        settings = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *settings, *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "-q")
    assert log._commit() is None  # no commit yet
    (package / "log.py").write_text("first")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD")
    assert log._commit() == commit
    (package / "log.py").write_text("second")
    assert log._commit() == commit + "+"
    monkeypatch.setenv("PATH", "")
    assert log._commit() is None  # no git


# --- progress -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stream", "quiet"), [(io.StringIO, False), (io.StringIO, True), (Terminal, True)])
def test_nothing_is_shown_without_a_terminal_or_when_quiet(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], quiet: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    with progress("a training", 4, 0, quiet=quiet) as shown:
        shown.step()
        shown.epoch(FIRST)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("a training", 10, 3, quiet=False) as shown:
        shown.step()
        shown.epoch(FIRST)
        shown.step()
        shown.epoch(SECOND)
        shown.step()
    text = sys.stderr.getvalue()  # type: ignore[attr-defined]
    first, last = text.split("\r")[1], text.rstrip("\n").split("\r")[-1]
    assert first.startswith("a training:  30%")
    assert "3/10" in first
    assert "6/10" in last
    assert "epoch=2, loss=0.3000, accuracy=97.50 %" in last


def test_an_epoch_without_evaluation_shows_no_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("a", 2, 0, quiet=False) as shown:
        shown.epoch(FIRST)
        shown.step()
    last = sys.stderr.getvalue().split("\r")[-1]  # type: ignore[attr-defined]
    assert "epoch=1, loss=2.5000" in last
    assert "accuracy" not in last


def test_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with (
        pytest.raises(MissingExtra, match=r'^tqdm cannot be imported .*pip install "refconv_kernels\[learn\]"$'),
        progress("a", 1, 0, quiet=True),
    ):
        pass
