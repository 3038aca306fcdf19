"""The commands ``learn``, ``fold`` and ``export``: what they print, and one line for every error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from refconv_kernels import refocus, reparameterize
from refconv_kernels.__main__ import main
from refconv_kernels.learning import run
from refconv_kernels.learning.models import build
from refconv_kernels.learning.signals import Stopped

QUICK = ["--epochs", "2", "--warmup-epochs", "1", "--batch-size", "100", "--threads", "1"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    threads = torch.get_num_threads()
    assert main(["learn", *QUICK, "--output", str(folder)]) == 0
    torch.set_num_threads(threads)
    return folder


def one_line(capsys: pytest.CaptureFixture, arguments: list[str]) -> str:
    """The error of a command that must fail."""
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_learn_says_what_came_of_it(done: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["learn", "--resume", str(done)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert printed.err == ""
    assert lines[0] == "refconv: RefConv (1B1L); 600 training images of digits"
    assert lines[1].startswith("test accuracy after the last epoch: ")
    assert "(baseline: " in lines[1]
    assert lines[2] == "parameters: 152,106 trained, 24,810 deployed"
    assert f"weights of the plain network: {done / 'refconv' / 'folded.safetensors'}" in " ".join(printed.out.split())


def test_a_toml_file_and_options_over_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = tmp_path / "settings.toml"
    config.write_text(
        'arm = "baseline"\nthreads = 1\nseed = 3\n[recipe]\nepochs = 2\nwarmup_epochs = 1\nbatch_size = 300\n'
    )
    assert main(["learn", "--config", str(config), "--seed", "4", "--output", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.startswith("baseline: the plain network from random weights")
    kept = (tmp_path / "run" / "settings.toml").read_text()
    assert "seed = 4\n" in kept
    assert "batch_size = 300\n" in kept


def test_compare_prints_its_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = str(tmp_path / "run")
    assert main(["learn", "compare", *QUICK, "--output", folder, "--seeds", "2", "--arms", "retrain"]) == 0
    printed = capsys.readouterr()
    assert "retrain - baseline" in printed.out
    assert printed.out.splitlines()[-1] == f"Wrote {folder}/comparison.txt, comparison.json, curves.png"
    assert [line.partition(":")[0] for line in printed.err.splitlines()] == [
        f"seed{seed}/{arm}" for arm in ("baseline", "retrain") for seed in (0, 1)
    ]


def test_errors_are_one_line(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    new = ["--output", str(tmp_path / "run")]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds a run: go on with --resume" in one_line(capsys, ["learn", *QUICK, "--output", str(done)])
    assert "holds no run to go on with" in one_line(capsys, ["learn", "--resume", str(empty)])
    assert "seed was 0, is 2" in one_line(capsys, ["learn", "--resume", str(done), "--seed", "2"])
    assert "model (='resnet') must be one of" in one_line(capsys, ["learn", *new, "--model", "resnet"])
    assert "arm (='magic') must be one of" in one_line(capsys, ["learn", *new, "--arm", "magic"])
    assert "warmup_epochs (=5) must be less than epochs (=5)" in one_line(capsys, ["learn", *new, "--epochs", "5"])
    assert "chosen first: use learn compare" in one_line(capsys, ["learn", *new, "--arm", "refconv-tuned"])
    assert "'thin'" in one_line(capsys, ["learn", *new, "--form", "thin", "--arm", "1b2l"])
    assert str(empty) in one_line(capsys, ["learn", *new, "--data", str(empty)])
    assert "nowhere.npz" in one_line(capsys, ["learn", *new, "--data", "nowhere.npz"])
    assert "nowhere.toml" in one_line(capsys, ["learn", *new, "--config", "nowhere.toml"])
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ["--epochs", "2", "--warmup-epochs", "0", "--lr", "1e30", "--threads", "1"]
    line = one_line(capsys, ["learn", *options, "--output", str(tmp_path / "run")])
    assert line.endswith("lower the learning rate")


def test_usage_errors(done: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, message in (
        (["learn", "--resume", str(done), "--output", "x"], "--resume takes settings and folder from the run"),
        (["learn", "--epochs", "two"], "argument --epochs: invalid int value: 'two'"),
        (["learn", "--form", "thick"], "argument --form: invalid choice: 'thick'"),
        (["learn", "compere"], "invalid choice: 'compere'"),
        (["learn", "--epoch=3"], "unrecognized arguments: --epoch=3"),
        (["fold", "x"], "arguments are required: -o/--output"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert message in capsys.readouterr().err


def test_stopped_is_one_line_and_the_signals_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise Stopped("stopped; all is saved", 15)

    monkeypatch.setattr(run, "learn", stop)
    assert main(["learn"]) == 143
    assert capsys.readouterr().err == "stopped; all is saved\n"


def test_fold(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for source in (done / "refconv", done / "refconv" / "checkpoint.safetensors"):
        assert main(["fold", str(source), "-o", str(tmp_path / "plain.safetensors")]) == 0
        assert capsys.readouterr().out == f"folded 4 layers into {tmp_path / 'plain.safetensors'}\n"
        ours, theirs = load_file(tmp_path / "plain.safetensors"), load_file(done / "refconv" / "folded.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    torch.manual_seed(0)
    model = refocus(build("small", 1, 10), identity=False)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    assert main(["fold", str(tmp_path / "model.pth"), "-o", str(tmp_path / "plain.pth"), "--no-identity"]) == 0
    expected = reparameterize(model).state_dict()
    plain = torch.load(tmp_path / "plain.pth", weights_only=True)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in expected.items())
    capsys.readouterr()
    assert "must end in" in one_line(capsys, ["fold", str(done / "refconv"), "-o", str(tmp_path / "plain.txt")])
    assert "does not exist" in one_line(capsys, ["fold", "nowhere.pth", "-o", str(tmp_path / "plain.pth")])


def test_export(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "network.pt2"
    assert main(["export", str(done / "refconv"), "-o", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"wrote {output}: images [B, C, H, W] to logits [B, classes]"
    assert lines[1].startswith("it expects (image - mean) / std of images from 0 to 1, mean 0.")
    assert lines[2].startswith("checked: its logits differ from the network's by at most ")
    program = torch.export.load(output).module()
    assert program(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    folded = str(done / "refconv" / "folded.safetensors")
    assert "give --model, --classes and --shape" in one_line(capsys, ["export", folded, "-o", str(output)])
    described = ["--model", "small", "--classes", "10", "--shape", "1", "8", "8"]
    assert main(["export", folded, "-o", str(output), *described]) == 0
