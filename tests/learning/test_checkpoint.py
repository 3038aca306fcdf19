"""Files that are whole or absent, and keep every bit."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from refconv_kernels.learning.checkpoint import (
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
