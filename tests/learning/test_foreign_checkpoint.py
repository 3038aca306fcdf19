"""Files that are damaged, or somebody else's: what is wrong is said, and no code is run."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from refconv_kernels.learning.checkpoint import FORMAT, Checkpoint, read, read_weights, write, write_weights
from refconv_kernels.learning.errors import CheckpointError, MissingExtra
from tests.learning.test_checkpoint import ABOUT, FILES, assert_same

# --- files that are damaged, or somebody else's -------------------------------------------------------------


@pytest.fixture
def whole_file(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    write(path, Checkpoint({"model.a": torch.randn(100)}, ABOUT))
    return path


@pytest.mark.parametrize("length", [0, 1, 7, 8, 20, 400, -1])
def test_a_truncated_checkpoint(whole_file: Path, length: int) -> None:
    content = whole_file.read_bytes()
    assert len(content) > 500
    whole_file.write_bytes(content[:length])
    for reader in (read, read_weights):
        with pytest.raises(CheckpointError, match=rf"^{whole_file} is damaged or no safetensors file \(.+\)$"):
            reader(whole_file)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_truncated_pickles(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "a.pth"
    torch.save({"a": torch.randn(20), "b": torch.ones(3)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for length in [0, 1, 2, 9, *range(20, len(content) - 1, len(content) // 12), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(
            CheckpointError, match=rf"^{path} (is damaged, or is no file of torch.save|holds more than)"
        ):
            read_weights(path)  # the second: where the cut is in the name of a type
    path.write_bytes(content)
    assert set(read_weights(path)[0]) == {"a", "b"}


def test_other_text(tmp_path: Path) -> None:
    for name in ("a.pth", "a.txt", "a"):
        (tmp_path / name).write_text("hello world\n")
        with pytest.raises(CheckpointError, match=rf"{name} is damaged, or is no file of torch.save$"):
            read_weights(tmp_path / name)
    (tmp_path / "a.safetensors").write_text("hello world\n")
    with pytest.raises(CheckpointError, match=r"a.safetensors is damaged or no safetensors file \("):
        read_weights(tmp_path / "a.safetensors")


def test_foreign_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    weights = {"a": torch.ones(2), "model.b": torch.zeros(1)}
    for metadata, shown in (
        (None, "None"),
        ({"format": "pt"}, "'pt'"),
        ({"format": "refconv_kernels.learning/2"}, "'ref.*2'"),
    ):
        save_file(weights, path, metadata)
        assert_same(read_weights(path)[0], weights)
        assert read_weights(path)[1] == {}
        message = rf"^{path} is not a checkpoint of this program: its format is {shown}, not '{FORMAT}'$"
        with pytest.raises(CheckpointError, match=message):
            read(path)


@pytest.mark.parametrize("about", [None, "", "{", "3", "[1]"])
def test_a_description_that_is_damaged(tmp_path: Path, about: str | None) -> None:
    from safetensors.torch import save_file

    metadata = {"format": FORMAT} | ({} if about is None else {"about": about})
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", metadata)
    for reader in (read, read_weights):
        with pytest.raises(CheckpointError, match=r"a.safetensors is damaged: its description cannot be read \(.+\)$"):
            reader(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", [*FILES, "weights.th", "weights"])
def test_missing_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^{tmp_path / name} does not exist$"):
        read_weights(tmp_path / name)


def test_missing_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"^{tmp_path / 'checkpoint.safetensors'} does not exist$"):
        read_weights(tmp_path)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path} is not a file$"):
        read(tmp_path)


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_weights(tmp_path / "a.pth", {"a": torch.ones(1)})
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda p: write_weights(p, {}), read, read_weights):
        with pytest.raises(
            MissingExtra, match=r'^safetensors cannot be imported .*pip install "refconv_kernels\[learn\]"$'
        ):
            call(tmp_path / "a.safetensors")
    assert set(read_weights(tmp_path / "a.pth")[0]) == {"a"}  # needs none


# --- pickles ------------------------------------------------------------------------------------------------


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_file_is_not_run(tmp_path: Path, zipped: bool) -> None:
    trap, path = tmp_path / "trap", tmp_path / "a.pth"
    torch.save({"a": torch.ones(2), "b": Malicious(trap)}, path, _use_new_zipfile_serialization=zipped)
    message = rf"^{path} holds more than tensors \(posix.mkdir\); it must hold a state_dict$"
    with pytest.raises(CheckpointError, match=message):
        read_weights(path)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # it would have


def test_code_in_a_plain_pickle_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(pickle.dumps(Malicious(tmp_path / "trap")))
    with pytest.raises(CheckpointError):
        read_weights(path)
    assert not (tmp_path / "trap").exists()


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "a.pth")
    message = r"holds more than tensors \(torch.nn.modules.linear.Linear\); it must hold a state_dict$"
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({}, "dict"),
        ([torch.ones(1)], "list"),
        (torch.ones(1), "Tensor"),
        ({"a": 3}, "dict"),
        ({"a": torch.ones(1), "epoch": 3}, "dict"),
        ({0: torch.ones(1)}, "dict"),
        ({"state_dict": {}}, "dict"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_state_dict(tmp_path: Path, content: object, kind: str) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=rf"a.pth holds a {kind}, it must hold a state_dict of tensors$"):
        read_weights(tmp_path / "a.pth")


WEIGHTS = {"conv.weight": torch.ones(2), "head.bias": torch.zeros(1)}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".bin"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        OrderedDict,
        lambda weights: {"state_dict": weights, "epoch": 3, "best": 0.5},
        lambda weights: {"model": weights, "optimizer": {"lr": 0.1}},
        lambda weights: {"state_dict": {"model": weights}},
        lambda weights: {f"module.{k}": t for k, t in weights.items()},
        lambda weights: {"state_dict": {f"module.{k}": t for k, t in weights.items()}},
        lambda weights: {f"_orig_mod.{k}": t for k, t in weights.items()},
        lambda weights: {f"_orig_mod.module.{k}": t for k, t in weights.items()},
        lambda weights: {f"module._orig_mod.{k}": t for k, t in weights.items()},
    ],
)
def test_a_state_dict_is_found_in_its_wrappings(tmp_path: Path, suffix: str, wrap: Any) -> None:
    torch.save(wrap(WEIGHTS), tmp_path / f"a{suffix}")
    weights, about = read_weights(tmp_path / f"a{suffix}")
    assert_same(weights, WEIGHTS)
    assert list(weights) == list(WEIGHTS)
    assert about == {}


def test_a_prefix_of_some_names_is_a_name(tmp_path: Path) -> None:
    weights = {"module.a": torch.ones(1), "modules.b": torch.ones(1), "model": torch.ones(2)}
    write_weights(tmp_path / "a.pth", weights)
    assert_same(read_weights(tmp_path / "a.pth")[0], weights)


def test_names_in_a_checkpoint_are_the_networks_own(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", Checkpoint({"model.module.a": torch.ones(1)}, {}))
    assert set(read_weights(tmp_path / "a.safetensors")[0]) == {"module.a"}
    write_weights(tmp_path / "b.safetensors", {"module.a": torch.ones(1)})
    assert set(read_weights(tmp_path / "b.safetensors")[0]) == {"a"}


def test_the_description_is_json(tmp_path: Path) -> None:
    from safetensors import safe_open

    write(tmp_path / "a.safetensors", Checkpoint({"model.a": torch.ones(1)}, ABOUT))
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == FORMAT
        assert json.loads(file.metadata()["about"]) == ABOUT
