"""Autotuning of the depthwise launches: off unless ``REFCONV_AUTOTUNE=1``, bounded, kept in memory and in a file.

The default is a rule's :class:`Configuration` (:mod:`.depthwise`). With autotuning, the first call of a problem
measures it and a few others near it, and every later one takes the fastest. All give the same results, up to the
rounding of dW, whose sums end elsewhere; each has the same bits in every run. Imports no Triton: ``info`` asks it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from refconv_kernels.backends.triton import AUTOTUNE, INTERPRETED

WARM_UP, ROUNDS = 3, 7  # launches of a configuration: not measured, measured
SECONDS = 20.0  # for one problem, compiling included; what was not reached by then is not tried
MOST_PROBLEMS = 256  # of one process: inputs of ever new sizes are not worth measuring
GAIN = 0.02  # of the default's time, that another configuration must save
_QUEUED_CYCLES = 2_000_000  # of the device, about a millisecond


class Configuration(NamedTuple):
    """How a launch goes through its problem."""

    rows: int  # pixels of a strip
    block_p: int  # strips of a tile
    block_c: int  # channels of a tile
    tiles: int  # of a program
    unrolled: int  # columns of taps whose loads may be under way together
    registers: int  # of a thread, at most
    warps: int


#: The default; or with the ``other`` height of strips, so many ``warps``, ``spread`` times the programs.
Rule = Callable[..., Configuration]


def alternatives(rule: Rule) -> list[Configuration]:
    """The default, then at most seven others, those likely to gain most first."""
    varied: list[dict[str, Any]] = [
        {}, {"other": True}, {"warps": 8}, {"warps": 2}, {"spread": 2}, {"spread": 0.5},
        {"other": True, "warps": 8}, {"other": True, "warps": 2},
    ]  # fmt: skip
    return list(dict.fromkeys(rule(**options) for options in varied))


def milliseconds(launch: Callable[[], object]) -> float:
    """Time of a launch on the current CUDA device and stream: the median of a few."""
    for _ in range(WARM_UP):
        launch()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS)]
    torch.cuda._sleep(_QUEUED_CYCLES)  # the launches queue up behind it, so that no time of Python's is measured
    for start, end in events:
        start.record()
        launch()
        end.record()
    events[-1][1].synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


#: What measures a launch; None: autotuning is off. The interpreter's times say nothing; tests put a timer here.
timer: Callable[[Callable[[], object]], float] | None = milliseconds if AUTOTUNE and not INTERPRETED else None
clock = time.monotonic

_known: dict[tuple[str, tuple[Any, ...]], Configuration] = {}  # by name of the device and problem
_lock = threading.Lock()  # two threads that measure would measure each other
_warned = False


def capturing(device: torch.device) -> bool:
    """Whether launches go into a CUDA graph: then nothing may be waited for."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def choose(
    problem: tuple[Any, ...], device: torch.device, rule: Rule, launch: Callable[[Configuration], object]
) -> Configuration:
    """The configuration of a problem: a known one, else the fastest, which is then known; the default while capturing.

    ``launch`` must leave nothing behind that a launch of another configuration does not overwrite.
    """
    key = _name(device), problem
    known = _known.get(key)
    if known is not None:
        return known
    with _lock:
        candidates, path = alternatives(rule), _path(key[0])
        kept = _read(path).get(repr(problem))
        # Of what a file says only candidates count: whoever wrote it, the launch is valid.
        chosen = _known.get(key) or next((one for one in candidates if list(one) == kept), None)
        if chosen is None and capturing(device):
            return candidates[0]
        if chosen is None and len(_known) < MOST_PROBLEMS:
            chosen = _known[key] = _fastest(candidates, launch)
            _write(path, {repr(problem): list(one) for (name, problem), one in _known.items() if name == key[0]})
        chosen = _known[key] = chosen or candidates[0]
    return chosen


def _fastest(candidates: list[Configuration], launch: Callable[[Configuration], object]) -> Configuration:
    assert timer is not None
    begin, default = clock(), candidates[0]
    times = {default: timer(lambda: launch(default))}
    for one in candidates[1:]:
        if clock() - begin > SECONDS:
            break
        try:
            times[one] = timer(lambda one=one: launch(one))  # type: ignore[misc]
        except Exception:  # it does not compile, or lacks resources: then it is none
            continue
    best = min(times, key=times.__getitem__)
    return best if times[best] < (1 - GAIN) * times[default] else default


# --- the file ------------------------------------------------------------------------------------------------


def directory() -> Path:
    """Where files of choices are kept."""
    return Path(os.environ.get("REFCONV_CACHE_DIR") or os.path.expanduser("~/.cache/refconv_kernels"))


def describe() -> str:
    """One line for ``info``."""
    if not AUTOTUNE:
        return "off (REFCONV_AUTOTUNE=1 turns it on)"
    return "on, but not in Triton's interpreter" if INTERPRETED else f"on, choices kept in {directory()}"


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def _version() -> str:
    """Of everything but the device that a choice was made for: Triton, and the kernels' source."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    return f"triton-{import_module('triton').__version__}-{digest[:12]}"


def _path(name: str) -> Path:
    return directory() / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{_version()}.json"


def _read(path: Path) -> dict[str, Any]:
    """Choices by problem; none where there is no file, or none of ours."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, choices: dict[str, list[int]]) -> None:
    """Add to the file, which is always whole; what another process adds at this moment it may have to measure again."""
    global _warned
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as beside:
            whole = Path(beside, path.name)
            whole.write_text(json.dumps({**_read(path), **choices}, indent=1) + "\n")
            os.replace(whole, path)
    except OSError as error:
        if not _warned:
            warnings.warn(f"choices of autotuning last for this process only: {error}", stacklevel=2)
        _warned = True
