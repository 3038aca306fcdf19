"""The run of ``learn``: a folder, a baseline, a second training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from refconv_kernels.learning import checkpoint, log
from refconv_kernels.learning import settings as options
from refconv_kernels.learning.arms import ARMS
from refconv_kernels.learning.distributed import ALONE, Processes, joined
from refconv_kernels.learning.errors import CheckpointError, SettingsError
from refconv_kernels.learning.settings import Settings
from refconv_kernels.learning.signals import Watch
from refconv_kernels.learning.tasks import Task, check_arms, prepare_torch, run_task

__all__ = ["learn", "open_run"]


def learn(settings: Settings, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Pretrain or load, refocus, train, fold, evaluate and save: ``python -m refconv_kernels learn``.

    The folder ``settings.output`` then holds ``settings.toml`` and ``environment.json`` (an entry per start), and a
    folder per training with ``checkpoint.safetensors``, ``log.csv``, ``log.jsonl``, ``curves.png``, ``result.json``
    and ``folded.safetensors``, the ``state_dict`` of the plain network.

    Args:
        settings: what to train, on what, and how.
        resume: go on with a run that was interrupted; False refuses a folder that holds one.
        quiet: no progress bars, as also where stderr is no terminal.

    Returns:
        The result of the last training, as in its ``result.json``; ``baseline_accuracy``, that of the network it
        started from (None for the baseline itself); and ``rank``, of this process.

    Raises:
        LearningError: settings, data or files are not what they must be, or a training diverged.
        Stopped: SIGINT or SIGTERM came; everything is saved.

    Example:
        >>> result = learn(Settings(output="run", data="digits", form="thin"))  # doctest: +SKIP
        >>> result["accuracy"]  # doctest: +SKIP
        98.08
    """
    output = Path(settings.output)
    device = prepare_torch(settings)
    ARMS[settings.arm].recipe(settings.recipe)
    check_arms([settings])
    with joined(settings.parallel, device) as processes, Watch() as watch:
        open_run(settings, device, resume=resume, processes=processes)
        given = None if settings.pretrained is None else Path(settings.pretrained)
        base = Task(output / "baseline", settings, "baseline", given)
        before = run_task(base, processes=processes, watch=watch, quiet=quiet)
        result, baseline = before, None
        if settings.arm != "baseline":
            task = Task(output / settings.arm, settings, settings.arm, given or base.directory)
            result = run_task(task, processes=processes, watch=watch, quiet=quiet)
            baseline = before["accuracy"]
        return {**result, "baseline_accuracy": baseline, "rank": processes.rank}


def open_run(settings: Settings, device: torch.device, *, resume: bool, processes: Processes = ALONE) -> None:
    """Make the folder of a run, or find the run in it.

    Raises:
        SettingsError: there is a run and ``resume`` is False, or none and it is True.
        CheckpointError: the run in it has other settings, or the folder cannot be written.
    """
    output = Path(settings.output)
    known = output / "settings.toml"
    try:
        exists = known.exists()
        if exists and not resume:
            raise SettingsError(f"{output} holds a run: go on with --resume {output}, or choose another --output")
        if resume and not exists:
            raise SettingsError(f"{output} holds no run to go on with (no settings.toml)")
        if exists:
            options.check_same(options.flat(options.from_toml(known)), settings, known)
        processes.wait()  # nobody looks after somebody has written
        if processes.rank == 0:
            output.mkdir(parents=True, exist_ok=True)
            checkpoint.write_file(known, lambda path: path.write_text(options.to_toml(settings)))
            starts = output / "environment.json"
            before = json.loads(starts.read_text()) if starts.exists() else []
            log.write_json(starts, [*before, log.environment(device)])
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{starts} is damaged ({error}): delete it") from error
    except OSError as error:
        raise CheckpointError(f"cannot use {output} as a folder: {error.strerror or error}") from error
    processes.wait()
