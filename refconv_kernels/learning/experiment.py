"""Arms times seeds, paired: ``python -m refconv_kernels learn compare``."""

from __future__ import annotations

import multiprocessing
import signal
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from refconv_kernels.learning import checkpoint, log
from refconv_kernels.learning import settings as options
from refconv_kernels.learning.arms import ARMS
from refconv_kernels.learning.compare import compare
from refconv_kernels.learning.errors import LearningError
from refconv_kernels.learning.picture import draw_curves
from refconv_kernels.learning.run import open_run
from refconv_kernels.learning.settings import Settings
from refconv_kernels.learning.signals import Stopped, Watch
from refconv_kernels.learning.tasks import RESULT, Task, check_arms, prepare_torch, run_task

__all__ = ["report", "run_comparison"]

_POLL = 0.2  # seconds between looks at the trainings that run
#: What refocused arms are measured against, in the order of the table.
CONTROLS = ("baseline", "retrain", "finetune", "retrain-tuned")


def run_comparison(settings: Settings, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train every arm from every seed, and judge the differences in accuracy on the test images after the last epoch.

    All second trainings of a seed start from the same baseline and see the same images in the same order. Where an
    arm's learning rate is tuned, it is chosen on images held out from the training images, from a baseline that has
    not seen them.

    Args:
        settings: ``compare`` says which arms, how many seeds and how many trainings at a time; ``seed`` is the
            first seed. With ``pretrained`` every seed starts from those weights. ``form="thin"`` holds for the arms
            in which it is the same model.
        resume, quiet: as for :func:`~refconv_kernels.learning.run.learn`.

    Returns:
        All figures, as in ``comparison.json``; :func:`report` makes text of them, which ``comparison.txt`` holds.

    Raises:
        LearningError, Stopped: as for :func:`~refconv_kernels.learning.run.learn`.
    """
    output, wanted = Path(settings.output), settings.compare
    device = prepare_torch(settings)
    arms = list(dict.fromkeys(arm for arm in wanted.arms if arm != "baseline"))
    check_arms([_settings_of(arm, settings) for arm in arms])
    with Watch() as watch:
        open_run(settings, device, resume=resume)
        given = None if settings.pretrained is None else Path(settings.pretrained)
        seeds = {f"seed{n}": replace(settings, seed=n) for n in range(settings.seed, settings.seed + wanted.seeds)}
        first = [Task(output / name / "baseline", own, "baseline", given) for name, own in seeds.items()]
        tuned_arms = [arm for arm in arms if ARMS[arm].lr == "tuned"]
        held, folder = wanted.held_out, output / "tuning"
        base = Task(folder / "baseline", settings, "baseline", given, held_out=held)
        _all([*first, base] if tuned_arms else first, wanted.jobs, watch, quiet)
        tries = [
            Task(
                base.directory.parent / f"{arm}-{rate:g}", settings, arm, given or base.directory, rate, wanted.held_out
            )
            for arm in tuned_arms
            for rate in wanted.rates
        ]
        tuning = _tuning(tries, _all(tries, wanted.jobs, watch, quiet))
        second = [
            Task(
                output / name / arm,
                _settings_of(arm, own),
                arm,
                given or output / name / "baseline",
                tuning[arm]["chosen"] if arm in tuning else None,
            )
            for name, own in seeds.items()
            for arm in arms
        ]
        done = _all([*first, *second], wanted.jobs, watch, quiet)
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for result in done:
        by_arm.setdefault(result["arm"], []).append(result)
    summary = _summary(settings, by_arm, tuning)
    log.write_json(output / "comparison.json", summary)
    checkpoint.write_file(output / "comparison.txt", lambda path: path.write_text(report(summary) + "\n"))
    draw_curves({arm: results[0]["history"] for arm, results in by_arm.items()}, output / "curves.png")
    return summary


def _settings_of(arm: str, settings: Settings) -> Settings:
    """Where the thin form is asked for, the arms in which it would be another model take the full one."""
    other = ARMS[arm].refocused and not ARMS[arm].can_be_thin
    return replace(settings, arm=arm, form="full" if other else settings.form)


def _all(tasks: Sequence[Task], jobs: int, watch: Watch, quiet: bool) -> list[dict[str, Any]]:
    """The results of ``tasks`` in their order, ``jobs`` at a time."""
    if jobs == 1 or len(tasks) < 2:
        return [_one(task, watch, quiet) for task in tasks]
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(jobs, context, initializer=_listen, initargs=(stop,)) as pool:
        running = [pool.submit(_one, task, None, True) for task in tasks]
        while wait(running, _POLL).not_done:
            if watch.asked is not None or any(one.done() and one.exception() for one in running):
                stop.set()  # none is cancelled: each that still starts ends at once
    errors = [error for one in running if (error := one.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):  # what stopped the others comes first
        if isinstance(error, Stopped):
            output = tasks[0].settings.output
            raise Stopped(f"stopped; all is saved, go on with --resume {output}", watch.asked or signal.SIGTERM)
        if isinstance(error, BrokenProcessPool):
            raise LearningError("a training's process was killed (too little memory?); go on with --resume") from error
        raise error
    return [one.result() for one in running]


class _Told(Watch):
    """Hears of a signal from the process that started this one, through an event."""

    def __init__(self, stop: Event) -> None:
        super().__init__()
        self._stop = stop

    @property
    def asked(self) -> int | None:
        return signal.SIGTERM if self._stop.is_set() else None


_told: _Told | None = None  # in a process of a pool


def _listen(stop: Event) -> None:
    """In a process of a pool, at its start: the first process alone hears signals, a terminal's Ctrl-C too."""
    global _told
    _told = _Told(stop)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _one(task: Task, watch: Watch | None, quiet: bool) -> dict[str, Any]:
    """Do one task; in a process of a pool (``watch`` is None) what its parent hears counts."""
    known = (task.directory / RESULT).exists()
    if watch is None:
        assert _told is not None
        if _told.asked is not None:
            raise Stopped("stopped before it began", signal.SIGTERM)
        prepare_torch(task.settings)
    result = run_task(task, watch=watch or _told, quiet=quiet)
    if not known and (quiet or not sys.stderr.isatty()):
        name = f"{task.directory.parent.name}/{task.directory.name}"
        print(f"{name}: {result['accuracy']:.2f} %, {result['seconds']:.0f} s", file=sys.stderr, flush=True)
    return result


def _tuning(tries: Sequence[Task], results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By arm: accuracy on the held-out images by learning rate, and the rate with the best."""
    found: dict[str, dict[str, Any]] = {}
    for task, result in zip(tries, results, strict=True):
        rates = found.setdefault(task.arm, {"rates": []})["rates"]
        rates.append({"lr": task.tuned, "held_out_accuracy": result["accuracy"]})
    for entry in found.values():
        entry["chosen"] = max(entry["rates"], key=lambda rate: rate["held_out_accuracy"])["lr"]
    return found


def _summary(
    settings: Settings, by_arm: dict[str, list[dict[str, Any]]], tuning: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    right = {arm: [result["accuracy"] for result in results] for arm, results in by_arm.items()}
    differences = []
    for arm, own in right.items():
        for control in CONTROLS if ARMS[arm].refocused else CONTROLS[:1]:
            if control in right and control != arm:
                found = compare([a - b for a, b in zip(own, right[control], strict=True)])
                differences.append({"arm": arm, "minus": control, **asdict(found)})
    first = next(iter(by_arm.values()))[0]
    return {
        "data": first["data"],
        "images": first["images"],
        "settings": options.flat(settings),
        "seeds": settings.compare.seeds,
        "tuning": tuning,
        "arms": {
            arm: {
                "text": ARMS[arm].text,
                "accuracy": right[arm],  # % of the test images after the last epoch, one per seed
                "accuracy_mean": statistics.fmean(right[arm]),
                "lr": results[0]["lr"],
                "training_parameters": results[0]["training_parameters"],
                "deployed_parameters": results[0]["deployed_parameters"],
                "seconds_per_epoch": statistics.median(e["seconds"] for r in results for e in r["history"]),
                "fold_difference": max(result["fold_difference"] for result in results),
            }
            for arm, results in by_arm.items()
        },
        "differences": differences,
    }


def report(summary: dict[str, Any]) -> str:
    """The figures of :func:`run_comparison` as text."""
    settings = summary["settings"]
    wide = max(len(name) for name in summary["arms"]) + 2
    lines = [
        f"{summary['data']}: {summary['images']} training images; model {settings['model']}, "
        f"{settings['recipe.epochs']} epochs each, {summary['seeds']} seeds, form {settings['form']}.",
        "Accuracy on the test images after the last epoch, in %. Every arm starts from the baseline of its seed.",
        "",
        f"{'':<{wide}}{'trained':>12}{'deployed':>12}{'lr':>9}{'s/epoch':>9}{'mean':>8}   per seed",
    ]
    for arm, entry in summary["arms"].items():
        each = "  ".join(f"{value:.2f}" for value in entry["accuracy"])
        lines.append(
            f"{arm:<{wide}}{entry['training_parameters']:>12,}{entry['deployed_parameters']:>12,}{entry['lr']:>9g}"
            f"{entry['seconds_per_epoch']:>9.1f}{entry['accuracy_mean']:>8.2f}   {each}"
        )
    lines += ["", "Differences in percentage points, paired by seed, with 95 % confidence intervals (Student's t)"]
    names = [f"{d['arm']} - {d['minus']}" for d in summary["differences"]]
    wide = max(map(len, names), default=0) + 2
    for name, d in zip(names, summary["differences"], strict=True):
        interval = "" if d["low"] is None else f"[{d['low']:+.2f}, {d['high']:+.2f}]"
        lines.append(f"{name:<{wide}}{d['mean']:>+7.2f}   {interval:<16} {d['verdict']}")
    if len(names) > 1:
        lines.append(f"({len(names)} intervals: by chance alone one in twenty excludes zero.)")
    for arm, entry in summary["tuning"].items():
        tried = ", ".join(f"{rate['lr']:g}: {rate['held_out_accuracy']:.2f}" for rate in entry["rates"])
        lines.append(f"learning rate of {arm}, by accuracy on held-out training images ({tried})")
    return "\n".join(lines)
