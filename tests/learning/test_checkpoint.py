"""Files that are whole or absent, keep every bit, and run no code."""

from __future__ import annotations

import errno
import json
import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refconv_kernels.learning.checkpoint import (
    FORMAT,
    Checkpoint,
    read,
    read_weights,
    remove_leftovers,
    write,
    write_file,
    write_weights,
)
from refconv_kernels.learning.errors import CheckpointError, MissingExtra

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
FILES = ("weights.safetensors", "weights.pth", "weights.pt")
ABOUT = {"settings": {"seed": 3, "recipe.lr": 0.1}, "history": [{"loss": None}], "name": "ä", "mean": [0.1, 1e-30]}


def tensors() -> dict[str, Tensor]:
    """What networks hold, and what files find hard."""
    made = {f"dtype.{dtype}": (100 * torch.randn(3, 5)).to(dtype) for dtype in DTYPES}
    made["channels_last"] = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    made["transposed"] = torch.randn(4, 3).t()
    made["special"] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    made["scalar"] = torch.tensor(7)
    made["empty"], made["empty too"] = torch.empty(0), torch.empty(2, 0, 3)
    made["part"] = torch.arange(10.0)[2:5]
    made["parameter"] = nn.Parameter(torch.randn(3))
    tied = torch.randn(6, 2)
    return {**made, "tied": tied, "tied too": tied, "tied in part": tied[1:3], "expanded": torch.ones(1).expand(4)}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert not got[name].requires_grad
        raw = [t.detach().contiguous().flatten().view(torch.uint8) for t in (got[name], tensor) if t.numel()]
        assert not raw or torch.equal(*raw), name  # to the bit: NaN and -0.0 too


def of_the_folder(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


# --- round trips --------------------------------------------------------------------------------------------


def test_checkpoint_and_back(tmp_path: Path) -> None:
    made = tensors()
    before = {name: t.detach().clone() for name, t in made.items()}
    write(tmp_path / "a.safetensors", Checkpoint(made, ABOUT))
    found = read(tmp_path / "a.safetensors")
    assert_same(found.tensors, before)
    assert found.about == ABOUT
    assert_same({name: t.detach() for name, t in made.items()}, before)  # what was written is left alone
    assert of_the_folder(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_weights_and_back(tmp_path: Path, name: str) -> None:
    made = {key: t.detach() for key, t in tensors().items()}
    write_weights(tmp_path / name, made)
    found, about = read_weights(tmp_path / name)
    assert_same(found, made)
    assert about == {}
    assert of_the_folder(tmp_path) == [name]


def test_a_written_file_is_what_other_programs_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = nn.Linear(2, 3).state_dict()
    for name in FILES:
        write_weights(tmp_path / name, weights)
    assert_same(load_file(tmp_path / FILES[0]), dict(weights))
    assert_same(torch.load(tmp_path / FILES[1], weights_only=True), dict(weights))


def test_nothing_in_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", Checkpoint({}, {}))
    found = read(tmp_path / "a.safetensors")
    assert (found.tensors, found.about, found.weights) == ({}, {}, {})


def test_parts_and_weights() -> None:
    one, two, three = (torch.tensor(n) for n in (1, 2, 3))
    whole = Checkpoint({"model.a.b": one, "model.c": two, "average.c": three, "modelled.d": one}, {})
    assert whole.part("model") == {"a.b": one, "c": two}
    assert whole.part("momentum") == {}
    assert whole.weights == {"a.b": one, "c": three}  # the average where there is one
    assert list(whole.weights) == ["a.b", "c"]


def test_what_is_read_is_what_is_evaluated(tmp_path: Path) -> None:
    made = {
        "model.a": torch.zeros(2),
        "average.a": torch.ones(2),
        "momentum.a": torch.ones(2),
        "state.loss": torch.ones(1),
    }
    write(tmp_path / "checkpoint.safetensors", Checkpoint(made, ABOUT))
    for path in (tmp_path, tmp_path / "checkpoint.safetensors"):  # the folder of a training
        weights, about = read_weights(path)
        assert_same(weights, {"a": torch.ones(2)})
        assert about == ABOUT


# --- whole or absent ----------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["new", "old"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where to write: nothing is there, or a file of before."""
    if request.param:
        (tmp_path / "file").write_text("before")
    return tmp_path / "file"


def assert_untouched(path: Path) -> None:
    assert of_the_folder(path.parent) in ([], ["file"])
    assert not path.exists() or path.read_text() == "before"


def test_a_file_is_written_and_replaced(path: Path) -> None:
    seen: list[Path] = []

    def fill(to: Path) -> int:
        seen.append(to)
        assert_untouched(path)
        to.write_text("after")
        assert not path.exists() or path.read_text() == "before"  # until it is whole
        return 42

    assert write_file(path, fill) == 42
    assert path.read_text() == "after"
    assert of_the_folder(path.parent) == ["file"]
    assert seen[0].parent == path.parent  # on the same disk
    assert seen[0].name.startswith(".file.")


@pytest.mark.parametrize("error", [ValueError("odd"), KeyboardInterrupt(), MissingExtra("no package")])
def test_a_writer_that_fails_half_way_leaves_nothing(path: Path, error: BaseException) -> None:
    def fill(to: Path) -> None:
        to.write_text("hal")
        raise error

    with pytest.raises(type(error)) as caught:
        write_file(path, fill)
    assert caught.value is error
    assert_untouched(path)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "Disk quota exceeded"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "Error while .*"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (OSError("without a number"), "without a number"),
    ],
)
def test_what_the_system_refuses_is_an_error_to_mend(path: Path, error: Exception, reason: str) -> None:
    def fill(to: Path) -> None:
        to.write_text("hal")
        raise error

    kept = "the file from before is as it was" if path.exists() else "nothing was left there"
    full = "No space" in str(error) or "quota" in str(error)
    hint = r"\. Make room and go on with --resume" if full else ""
    with pytest.raises(CheckpointError, match=rf"^cannot write {path}: {reason}; {kept}{hint}$"):
        write_file(path, fill)
    assert_untouched(path)


def test_a_disk_that_fails_to_flush(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"^cannot write .*: Input/output error; "):
        write_file(path, lambda to: to.write_text("after"))
    assert_untouched(path)


def test_it_is_on_the_disk_before_it_has_its_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    before = path.exists()

    def note(descriptor: int) -> None:
        assert path.exists() == before
        flushed.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)

    monkeypatch.setattr(os, "fsync", note)
    write_file(path, lambda to: to.write_text("after"))
    assert len(flushed) == 1
    assert not Path("/proc/self/fd").exists() or flushed[0].startswith(".file.")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and /proc as on Linux")
@pytest.mark.parametrize("name", FILES)
def test_a_real_disk_that_is_full(tmp_path: Path, name: str) -> None:
    """A limit on the size of files fails the system's write itself, half way, in whatever library makes it."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = {"a": torch.zeros(3)}
    write_weights(tmp_path / name, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=rf"^cannot write .*{name}: .*File too large.*; the file from before"):
            write_weights(tmp_path / name, {"a": torch.zeros(2**20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_same(read_weights(tmp_path / name)[0], before)
    assert of_the_folder(tmp_path) == [name]


@pytest.mark.parametrize("name", FILES)
def test_a_folder_that_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    for folder in ("missing", "file"):
        with pytest.raises(CheckpointError, match=rf"^cannot write {tmp_path / folder / name}: .*; nothing was left"):
            write_weights(tmp_path / folder / name, {"a": torch.zeros(3)})
    assert of_the_folder(tmp_path) == ["file"]


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.pth" / "inside").mkdir(parents=True)
    with pytest.raises(
        CheckpointError, match=r"^cannot write .*a.pth: (Is a directory|Directory not empty|File exists);"
    ):
        write_weights(tmp_path / "a.pth", {"a": torch.zeros(3)})
    assert of_the_folder(tmp_path) == ["a.pth"]


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    kept = [".hidden", ".config.d", "a.safetensors", "b.12", ".tmp"]
    for name in (*kept, ".a.safetensors.123", ".log.csv.4", ".tmpA1b2C3"):  # the last is safetensors' own
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert of_the_folder(tmp_path) == sorted(kept)
    remove_leftovers(tmp_path / "missing")


def test_what_a_killed_process_leaves_is_among_them(tmp_path: Path) -> None:
    left: list[Path] = []

    def fill(to: Path) -> None:
        to.write_text("{}")
        left.append(to)

    write_file(tmp_path / "a.json", fill)
    left[0].touch()
    remove_leftovers(tmp_path)
    assert of_the_folder(tmp_path) == ["a.json"]


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
