"""The written program computes what the network does, for every batch size; and what is missing is said."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refconv_kernels import refocus
from refconv_kernels.learning import export as module
from refconv_kernels.learning import models
from refconv_kernels.learning.arms import ARMS
from refconv_kernels.learning.checkpoint import Checkpoint, write, write_weights
from refconv_kernels.learning.errors import CheckFailed, CheckpointError, MissingExtra, SettingsError
from refconv_kernels.learning.export import export
from refconv_kernels.learning.models import SmallSeparableNet

SAID: dict[str, Any] = {"model": "tiny", "classes": 3, "shape": (1, 8, 8)}
FORMATS = (".onnx", ".pt2")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.BUILT_IN, "tiny", lambda channels, classes: SmallSeparableNet(channels, classes, (4, 6)))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """The ``state_dict`` of a refocused network."""
    write_weights(tmp_path / "in.pth", refocused().state_dict())
    return tmp_path / "in.pth"


def refocused(name: str = "refconv") -> nn.Module:
    torch.manual_seed(1)
    network = models.build("tiny", 1, 3)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):  # as if it were trained
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return ARMS[name].start(network)


def program(path: Path) -> Callable[[Tensor], Tensor]:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["images"]
    assert [o.name for o in session.get_outputs()] == ["logits"]
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_program_gives_the_networks_logits(tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture) -> None:
    """From the folder of a training, which says all there is to know; of an arm that is not the default."""
    network = refocused("no-identity")
    tensors = {f"model.{key}": t for key, t in network.state_dict().items()}
    about = {
        "arm": "no-identity",
        "settings": {"model": "tiny"},
        "classes": ["a", "b", "c"],
        "shape": [1, 8, 8],
        "mean": [0.5],
        "std": [0.25],
    }
    write(tmp_path / "checkpoint.safetensors", Checkpoint(tensors, about))
    output = tmp_path / f"out{suffix}"
    found = export(tmp_path, output)
    assert {key: found[key] for key in ("mean", "std")} == {"mean": [0.5], "std": [0.25]}
    assert 0 <= found["difference"] < 1e-5
    run = program(output)
    for batch in (1, 5):
        images = torch.rand(batch, 1, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(run(images), network.eval()(images), rtol=1e-4, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.safetensors", output.name]
    assert capfd.readouterr() == ("", "")  # nor does torch speak


def test_a_program_needs_none_of_our_code(weights: Path, tmp_path: Path) -> None:
    found = export(weights, tmp_path / "out.pt2", **SAID)
    assert (found["mean"], found["std"]) == (None, None)
    graph = str(torch.export.load(tmp_path / "out.pt2").graph)
    assert "conv2d" in graph
    assert "refconv" not in graph


def test_onnx_without_onnxruntime_is_not_checked(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = export(weights, tmp_path / "out.onnx", **SAID)
    assert found["difference"] is None
    import onnx

    onnx.checker.check_model(str(tmp_path / "out.onnx"))


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_onnx_needs_its_packages(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf'^{package} cannot be .*: pip install "refconv_kernels\[export\]"$'):
        export(weights, tmp_path / "out.onnx", **SAID)
    assert not (tmp_path / "out.onnx").exists()


class Wrong(nn.Module):
    """What it computes changes as soon as it has been traced: while it is not, its logits are others."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        more = 0 if torch.compiler.is_exporting() else self.size
        return self.scale * images.flatten(1) + more


@pytest.mark.parametrize(("suffix", "size", "shown"), [(".onnx", 0.5, "0.5"), (".pt2", float("nan"), "nan")])
def test_a_program_that_computes_something_else_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, size: float, shown: str
) -> None:
    monkeypatch.setitem(models.BUILT_IN, "tiny", lambda channels, classes: Wrong(size))
    write_weights(tmp_path / "in.pth", {"scale": torch.ones(1)})
    output = tmp_path / f"out{suffix}"
    output.write_text("before")
    with pytest.raises(CheckFailed, match=rf"^the exported program differs by {shown}; rounding explains 0.0"):
        export(tmp_path / "in.pth", output, **SAID)
    assert output.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 2


def test_one_batch_size_alone_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = nn.Flatten(), torch.rand(2, 1, 2, 2)
    assert module._check(network, images, network) == 0
    with pytest.raises(CheckFailed, match=r"^the exported program differs by 1; rounding explains 0.0001$"):
        module._check(network, images, lambda x: network(x) + (len(x) != 2))
    assert module._check(network, images, lambda x: network(x) + 5e-5) == pytest.approx(5e-5, rel=0.01)


# --- what is missing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", list(SAID))
def test_what_the_file_does_not_say_must_be_given(weights: Path, tmp_path: Path, missing: str) -> None:
    said = {key: value for key, value in SAID.items() if key != missing}
    with pytest.raises(SettingsError) as caught:
        export(weights, tmp_path / "out.pt2", **said)
    assert str(caught.value) == f"{weights} does not say what network it is: give --model, --classes and --shape"


@pytest.mark.parametrize("name", ["out", "out.pth", "out.ONNX", "out.onnx.txt"])
def test_the_suffix_says_the_format(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        export(tmp_path / "missing.pth", tmp_path / name, **SAID)  # before anything is read
    assert str(caught.value) == f"output (='{tmp_path / name}') must end in .onnx or .pt2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 4}, r"in.pth does not fit the model 'tiny': .*size mismatch for classifier"),
        ({"shape": (3, 8, 8)}, r"in.pth does not fit the model 'tiny': .*size mismatch for stem"),
        ({"model": "resnet20"}, r"in.pth does not fit the model 'resnet20': .*Missing key"),
    ],
)
def test_weights_of_another_network(weights: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"(?s)^{tmp_path}/{message}"):
        export(weights, tmp_path / "out.pt2", **{**SAID, **change})


def test_a_network_that_is_none(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^model \(='tony'\) must be one of"):
        export(weights, tmp_path / "out.pt2", **{**SAID, "model": "tony"})


def test_files_that_cannot_be_read_or_written(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/missing.pth does not exist$"):
        export(tmp_path / "missing.pth", tmp_path / "out.pt2", **SAID)
    output = tmp_path / "missing" / "out.pt2"
    with pytest.raises(CheckpointError, match=rf"^cannot write {output}: No such file or directory; nothing was left"):
        export(weights, output, **SAID)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits as on Linux")
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_disk_that_is_full(weights: Path, tmp_path: Path, suffix: str) -> None:
    import resource

    output = tmp_path / f"out{suffix}"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=rf"^cannot write {output}: File too large; nothing was left there$"):
            export(weights, output, **SAID)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


def test_the_checkpoint_can_be_overruled(tmp_path: Path) -> None:
    network = refocus(models.build("tiny", 1, 3))
    tensors = {f"model.{key}": t for key, t in network.state_dict().items()}
    about = {"arm": "refconv", "settings": {"model": "gone:network"}, "classes": ["a"], "shape": [9, 8, 8]}
    write(tmp_path / "checkpoint.safetensors", Checkpoint(tensors, about))
    assert export(tmp_path, tmp_path / "out.pt2", **SAID)["difference"] < 1e-5
