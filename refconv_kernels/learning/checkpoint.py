"""Files that are whole or absent, and that run no code when they are read."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from refconv_kernels.learning.errors import CheckpointError, require

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs apart there
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "FORMAT",
    "Checkpoint",
    "locked",
    "read",
    "read_weights",
    "remove_leftovers",
    "write",
    "write_file",
    "write_weights",
]

T = TypeVar("T")

#: Says whose file it is, and in which version of its layout.
FORMAT = "refconv_kernels.learning/1"

_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel's and torch.compile's


class Checkpoint:
    """Tensors by name, and a description of them.

    Args:
        tensors: names begin with ``model.``, ``average.``, ``momentum.`` or ``state.``.
        about: anything that JSON can hold: settings, position, history.
    """

    def __init__(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        self.tensors, self.about = dict(tensors), dict(about)

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``name`` and a dot, without it."""
        return {key[len(name) + 1 :]: t for key, t in self.tensors.items() if key.startswith(name + ".")}

    @property
    def weights(self) -> dict[str, Tensor]:
        """The ``state_dict`` of the network to evaluate: the average, where one was kept."""
        return {**self.part("model"), **self.part("average")}


def write_file(path: Path, fill: Callable[[Path], T]) -> T:
    """Let ``fill`` write a temporary file beside ``path``, flush it to the disk and rename it.

    Whatever happens, ``path`` is afterwards the old file or the new one.

    Returns:
        What ``fill`` returned.

    Raises:
        CheckpointError: the file cannot be written; the message says why (a full disk, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        filled = fill(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        return filled
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error)
        # safetensors reports what the system says as text
        if not isinstance(error, OSError) and "I/O error" not in reason and "IoError" not in reason:
            raise
        kept = "the file from before is as it was" if os.path.exists(path) else "nothing was left there"
        full = any(os.strerror(code) in reason for code in (errno.ENOSPC, errno.EDQUOT))
        hint = ". Make room and go on with --resume" if full else ""
        raise CheckpointError(f"cannot write {path}: {reason}; {kept}{hint}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """This process alone uses ``directory``; the lock goes with the process, however it ends.

    Raises:
        CheckpointError: another process uses it, or it cannot be written.
    """
    with contextlib.ExitStack() as opened:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = opened.enter_context((directory / ".lock").open("w"))
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"another process is at work in {directory}") from error
        except OSError as error:
            raise CheckpointError(f"cannot use {directory} as a folder: {error.strerror or error}") from error
        yield


def remove_leftovers(directory: Path) -> None:
    """Delete what :func:`write_file` left unfinished in a process that was killed."""
    for file in directory.glob(".*"):
        if re.fullmatch(r"\..+\.\d+|\.tmp\w{6}", file.name):  # the second: safetensors' own, before ours
            file.unlink(missing_ok=True)


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint as safetensors; see :func:`write_file`."""
    _write_safetensors(path, checkpoint.tensors, {"format": FORMAT, "about": json.dumps(checkpoint.about)})


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a ``state_dict``: pickled, as ``torch.save`` does, for ``.pth`` and ``.pt``, else as safetensors."""
    if path.suffix in (".pth", ".pt"):
        buffer = io.BytesIO()  # torch.save itself turns a full disk into a RuntimeError without a reason
        torch.save(dict(weights), buffer)
        write_file(path, lambda to: to.write_bytes(buffer.getbuffer()))
    else:
        _write_safetensors(path, weights, {"format": "pt"})


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str]) -> None:
    save = require("safetensors.torch").save_file
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        shared = tensor.numel() > 0 and tensor.untyped_storage().data_ptr() in seen
        kept[name] = tensor.clone() if shared else tensor  # tied weights: safetensors wants each by itself
        seen.add(tensor.untyped_storage().data_ptr())
    write_file(path, lambda to: save(kept, to, about))


def read(path: Path) -> Checkpoint:
    """Read a checkpoint that :func:`write` wrote.

    Raises:
        CheckpointError: there is none, it is damaged, or it is some other file.
    """
    tensors, metadata = _read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a checkpoint of this program: its format is {metadata.get('format')!r}, not {FORMAT!r}"
        )
    try:
        return Checkpoint(tensors, json.loads(metadata["about"]))
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: its description cannot be read ({error})") from error


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A network's ``state_dict`` from a file of this program's or another's, and what is known about it.

    Args:
        path: a checkpoint or any safetensors file; a ``.pth``, ``.pt`` or ``.th`` file of a ``state_dict``, perhaps
            inside a dictionary under ``state_dict`` or ``model``; or the folder of a training.

    Returns:
        The ``state_dict``, without the prefixes ``module.`` and ``_orig_mod.`` that wrappers leave, and the
        description of a :class:`Checkpoint`, empty for other files.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else. Pickled code is never run.
    """
    if path.is_dir():
        path = path / "checkpoint.safetensors"
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
        if metadata.get("format") == FORMAT:
            checkpoint = read(path)
            return checkpoint.weights, checkpoint.about  # its names are the network's own
    else:
        tensors = _read_pickle(path)
    while tensors and (prefix := next((p for p in _WRAPPERS if all(k.startswith(p) for k in tensors)), "")):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors, {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    safe_open = require("safetensors").safe_open
    _check_exists(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file ({error})") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    _check_exists(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's first lines advise to load the file all the same
        named = re.search(r"GLOBAL (\w+(?:\.\w+)+)", str(error))
        if named is not None:
            raise CheckpointError(f"{path} holds more than tensors ({named[1]}); it must hold a state_dict") from error
        raise CheckpointError(f"{path} is damaged, or is no file of torch.save") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    by_name = isinstance(content, dict) and all(isinstance(key, str) for key in content)
    if not by_name or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, it must hold a state_dict of tensors")
    return dict(content)


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
