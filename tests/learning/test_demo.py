"""The demonstration from the command line to its files, the verdict, and the checks that must fail."""

from __future__ import annotations

import io
import json
import re
import statistics
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refconv_kernels import refocus, reparameterize
from refconv_kernels.__main__ import main
from refconv_kernels.learning import demo, timing
from refconv_kernels.learning.data import digits
from refconv_kernels.learning.demo import ARMS, check_fold, compare
from refconv_kernels.learning.errors import CheckFailed
from refconv_kernels.learning.loop import accuracy, logits
from refconv_kernels.learning.models import SmallSeparableNet
from refconv_kernels.learning.timing import step_times


@dataclass
class Run:
    output: Path
    text: str
    progress: str
    results: dict[str, Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = tmp_path_factory.mktemp("demo") / "new" / "folder"
    text, progress = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(text), redirect_stderr(progress):
        patch.setattr(timing, "step_times", lambda steps: step_times(steps, rounds=3))
        code = main(["demo", "--output", str(output), "--seeds", "2", "--epochs", "1"])
    assert code == 0
    assert torch.get_num_threads() == threads
    return Run(output, text.getvalue(), progress.getvalue(), json.loads((output / "results.json").read_text()))


def test_it_writes_its_files_and_nothing_else(finished: Run) -> None:
    names = ["folded.safetensors", "kernels.png", "results.json"]
    assert sorted(path.name for path in finished.output.iterdir()) == names
    assert (finished.output / "kernels.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(finished.results["files"]) == [str(finished.output / name) for name in names]
    assert all(str(finished.output / name) in finished.text.splitlines()[-1] for name in names)


def test_one_line_per_training_where_there_is_no_terminal(finished: Run) -> None:
    lines = finished.progress.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"seed {seed}, {arm}" for seed in (0, 1) for arm in ARMS]
    assert all(re.search(r": 1 epochs? in \d+\.\d s, loss \d+\.\d{4}$", line) for line in lines)


def test_the_figures_are_consistent(finished: Run) -> None:
    results = finished.results
    arms = results["arms"]
    images = results["data"]["test_images"]
    for arm in arms.values():
        assert len(arm["accuracy"]) == len(arm["loss"]) == results["seeds"] == 2
        assert arm["accuracy_mean"] == pytest.approx(statistics.fmean(arm["accuracy"]))
        assert all(value * images / 100 == pytest.approx(round(value * images / 100)) for value in arm["accuracy"])
        assert all(len(losses) == results["recipe"]["epochs"] == 1 for losses in arm["loss"])
    for name, difference in results["differences"].items():
        pairs = [a - b for a, b in zip(arms["RefConv"]["accuracy"], arms[name]["accuracy"], strict=True)]
        assert difference["mean"] == pytest.approx(statistics.fmean(pairs))
        assert difference["verdict"] == compare(pairs).verdict
    plain = sum(p.numel() for p in SmallSeparableNet().parameters())
    assert {arm["deployed_parameters"] for arm in arms.values()} == {plain}
    assert arms["baseline"]["training_parameters"] == arms["retrain"]["training_parameters"] == plain
    trained = sum(p.numel() for p in refocus(SmallSeparableNet()).parameters() if p.requires_grad)
    assert arms["RefConv"]["training_parameters"] == trained
    assert results["machine"]["threads"] == 1
    assert set(results["step"]["ms"]) == {"plain", "two_convolutions", "ours"}


def test_the_weights_are_those_of_the_first_seed(finished: Run) -> None:
    from safetensors.torch import load_file

    network = SmallSeparableNet()
    network.load_state_dict(load_file(finished.output / "folded.safetensors"), strict=True)
    test = digits()[1]
    assert accuracy(logits(network, test.images), test) == finished.results["arms"]["RefConv"]["accuracy"][0]


def test_the_table_shows_the_figures(finished: Run) -> None:
    arms = finished.results["arms"]
    assert "600 training images, 1197 test images" in finished.text
    for name, arm in arms.items():
        (line,) = (line for line in finished.text.splitlines() if re.match(rf"{name} +\d", line))
        figures = [f"{arm['training_parameters']:,}", f"{arm['deployed_parameters']:,}", f"{arm['accuracy_mean']:.2f}"]
        assert line.split() == [name, *figures, *(f"{value:.2f}" for value in arm["accuracy"])]
    for name, difference in finished.results["differences"].items():
        (line,) = (line for line in finished.text.splitlines() if line.startswith(f"RefConv - {name}"))
        assert f"{difference['mean']:+.2f}" in line
        assert line.endswith(difference["verdict"])
    assert len(re.findall(r"\d+\.\d\d ms +\d+\.\d\d x plain", finished.text)) == 3
    assert f"torch {torch.__version__}" in finished.text


def test_verdict_needs_an_interval_without_zero() -> None:
    gain = compare([1.0, 2.0, 3.0, 2.0])
    assert gain.verdict == "a gain: the interval excludes zero"
    loss = compare([-1.0, -2.0, -3.0, -2.0])
    assert loss.verdict == "a loss: the interval excludes zero"
    assert (loss.low, loss.high) == pytest.approx((-gain.high, -gain.low))  # type: ignore[operator]
    none = compare([1.0, 2.0, 3.0])
    assert none.verdict == "no difference could be measured: the interval includes zero"
    half = 4.302653 / 3**0.5  # Student's t at 0.975 with 2 degrees of freedom; the deviation is 1
    assert (none.mean, none.low, none.high) == pytest.approx((2.0, 2 - half, 2 + half), rel=1e-6)


@pytest.mark.parametrize("differences", [[3.0], [0.5, 0.5, 0.5], [0.0, 0.0]])
def test_no_spread_no_verdict(differences: list[float]) -> None:
    comparison = compare(differences)
    assert (comparison.low, comparison.high) == (None, None)
    assert comparison.verdict.startswith("no difference could be measured: no interval from")


def test_fold_check_finds_changed_logits() -> None:
    class Constant(nn.Module):
        def __init__(self, values: list[float]) -> None:
            super().__init__()
            self.values = torch.tensor(values)

        def forward(self, images: Tensor) -> Tensor:
            return self.values.expand(len(images), -1)

    images = torch.zeros(7, 1, 8, 8)
    assert check_fold(Constant([1, 2]), Constant([1, 2.00001]), images) == pytest.approx(1e-5, rel=0.1)
    for values in ([1, 2.1], [1, float("nan")]):
        with pytest.raises(CheckFailed, match="folding changed the logits by"):
            check_fold(Constant([1, 2]), Constant(values), images)


def test_a_failed_check_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def wrong(model: nn.Module) -> nn.Module:
        folded = reparameterize(model)
        with torch.no_grad():
            folded.stem[0].weight[0] += 1
        return folded

    monkeypatch.setattr(demo, "reparameterize", wrong)
    monkeypatch.setattr(demo, "digits", lambda: digits(100))
    assert main(["demo", "--output", str(tmp_path), "--seeds", "1", "--epochs", "1"]) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("error: folding changed the logits by")
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "package", ["tqdm", "sklearn.datasets", "scipy.stats", "matplotlib.figure", "safetensors.torch"]
)
def test_a_missing_extra_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {package.partition('.')[0]} cannot be imported")
    assert line.endswith('pip install "refconv_kernels[learn]"')
    assert not (tmp_path / "demo").exists()


def test_an_output_that_cannot_be_written_is_found_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(demo, "train", lambda *_, **__: pytest.fail("trained"))
    file = tmp_path / "file"
    file.touch()
    for output in (file, file / "folder"):
        assert main(["demo", "--output", str(output)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: cannot write to {output}: ")


def test_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", interrupted)
    assert main(["demo", "--output", str(tmp_path)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


@pytest.mark.parametrize("option", ["--seeds", "--epochs"])
@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", ""])
def test_numbers_must_be_positive(capsys: pytest.CaptureFixture, option: str, value: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["demo", f"{option}={value}"])
    assert f"argument {option}: {value!r} must be a whole number of at least 1" in capsys.readouterr().err
