"""``python -m benchmarks.report FILE.json [--markdown]``: ratios of the formulations measured in one run."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = ("weight transform", "layer", "convolution", "bandwidth", "training step", "optimizer step")
BASELINES = ("plain", "two_convolutions", "copy", "adamw")
OWN = ("ours", "thin")
CASES = ("depthwise", "groupwise", "dense")
BANDWIDTH_GOALS = {"forward": 0.7, "backward": 0.6}
MISSING = "-"
LEGEND = (
    "Times are the shortest of their rounds, in ms, with warm caches. A ratio is another formulation's time divided by "
    "ours in the same run: above 1, ours is faster. ours is the full form, "
    "thin ours in the thin form. GB/s: bytes that ours must move at least, by its time. Under "
    "bandwidth, copy is a clone() of as many bytes of the same memory, so copy/ours is the share of the copy's "
    "bandwidth; both are operators, called without autograd. Training steps "
    "take FusedSGD for ours and thin, PyTorch's fused SGD for the others."
)


@dataclass
class Row:
    """One group: the same work in each of the formulations. Seconds, by formulation."""

    kind: str
    mode: str
    shape: str
    case: str | None
    networks: dict[str, int]
    bytes: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    against: dict[str, float] = field(default_factory=dict)  # time / plain, measured in turns

    def ratio(self, other: str, own: str) -> float | None:
        """The time of ``other`` divided by that of ``own``; None if one of them was not measured."""
        if other not in self.seconds or own not in self.seconds:
            return None
        return self.seconds[other] / self.seconds[own]


def read_rows(run: dict[str, Any]) -> list[Row]:
    """The groups of a pytest-benchmark file, in the order of their measurement."""
    rows: dict[tuple[str, str], Row] = {}
    for benchmark in run["benchmarks"]:
        info = benchmark["extra_info"]
        if "peak_bytes" in info:
            continue
        row = rows.setdefault(
            (benchmark["group"], info["mode"]),
            Row(*(info[key] for key in ("kind", "mode", "shape", "case", "networks"))),
        )
        row.seconds[info["formulation"]] = benchmark["stats"]["min"]
        if "against" in info:
            row.against[info["formulation"]] = info["against"]
        row.seconds.update(info.get("baseline", {}))
        if info["formulation"] == "ours":
            row.bytes = info["bytes"]
    return list(rows.values())


def _memory(run: dict[str, Any]) -> list[list[str]]:
    """Two lines per network whose peak memory was measured; MB of 10^6 bytes."""
    networks: dict[tuple[str, str], dict[str, int]] = {}
    for info in (benchmark["extra_info"] for benchmark in run["benchmarks"]):
        for kind in ("allocated", "peak"):
            if f"{kind}_bytes" not in info:
                continue
            what = "allocated by PyTorch" if kind == "allocated" else "resident"
            peaks = networks.setdefault((info["shape"], what), {})
            peaks[info["formulation"]] = info[f"{kind}_bytes"]
            if info["formulation"] == "ours":
                peaks["refocus"] = info["refocus_bytes"]
    names = ["plain", "two_convolutions", *OWN]
    table = [["training step", *names, *(f"{own} - plain" for own in OWN), "W_r, its gradient, momentum"]]
    for (name, what), peaks in networks.items():
        plain = peaks.get("plain")
        more = [None if plain is None or own not in peaks else peaks[own] - plain for own in OWN]
        figures = (*(peaks.get(key) for key in names), *more, 3 * peaks["refocus"] if "refocus" in peaks else None)
        table.append([f"{name}, {what}", *(_number(None if f is None else f / 1e6, 1) for f in figures)])
    return table


def geometric_mean(ratios: Iterable[float | None]) -> float | None:
    """Of those that were measured, each with the same weight; None if there are none."""
    logs = [math.log(ratio) for ratio in ratios if ratio is not None]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _header(run: dict[str, Any]) -> list[str]:
    facts = run["machine_info"].get("refconv", {})
    infos = [benchmark["extra_info"] for benchmark in run["benchmarks"]]
    python = run["machine_info"].get("python_version")

    def each(values: Iterable[Any]) -> str:
        return ", ".join(map(str, dict.fromkeys(values)))

    lines = {
        "machine": f"{facts.get('cpu')}, {facts.get('cores')} cores, {facts.get('threads')} threads used, "
        f"load {_number(facts.get('load_before'), 1)} before, {_number(facts.get('load_after'), 1)} at the end",
        "versions": f"torch {facts.get('torch')}, Python {python}, commit {facts.get('commit')}, {run.get('datetime')}",
        "kernels": f"backend {facts.get('backend')}, instruction set {facts.get('instruction_set')}",
        "problem": f"{each(info['dtype'] for info in infos)}, "
        f"layers with batch {each(info['batch'] for info in infos if info['kind'] == 'layer') or MISSING}",
    }
    if probes := [info["probe"] for info in infos if "probe" in info]:
        speedups = thread_speedups(probes, facts["threads"])
        lines["threads"] = (
            f"arithmetic was {statistics.median(speedups):.2f} times as fast with all of them as with one, median of "
            f"{len(speedups)} samples ({min(speedups):.2f} to {max(speedups):.2f}); cores may be shared"
        )
    if _disturbed(facts):
        lines["WARNING"] = "the load was above this run's own: other processes may have disturbed times and ratios"
    return [f"{name + ':':10}{value}" for name, value in lines.items()]


def thread_speedups(probes: Sequence[Sequence[float]], threads: int) -> list[float]:
    """How many times as fast arithmetic was with all threads as with one, for each :func:`benchmarks.machine.probe`.

    The one may have shared its core, too: its time is the shortest of all.
    """
    return [threads * min(one for one, _ in probes) / every for _, every in probes]


def _disturbed(facts: dict[str, Any]) -> bool:
    """Whether the load (running processes, a mean over a minute) was more than this run's own."""
    before, after = facts.get("load_before"), facts.get("load_after")
    return (before or 0) > 0.5 or (after or 0) > facts.get("threads", 0) + 0.5


def _number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def _measured(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    return [name for name in names if any(name in row.seconds for row in rows)]


def _detail(rows: Sequence[Row]) -> list[list[str]]:
    """One line per group, for groups of one kind and mode."""
    baselines, own = _measured(BASELINES, rows), _measured(OWN, rows)
    with_bytes = any(row.bytes for row in rows)
    table = [["shape", *baselines, *own, *(f"{other}/{name}" for name in own for other in baselines)]]
    table[0] += ["GB/s ours"] if with_bytes else []
    for row in rows:
        cells = [row.shape]
        for name in (*baselines, *own):
            seconds = row.seconds.get(name)
            cells.append(_number(None if seconds is None else seconds * 1e3, 3))
        cells += [_number(row.ratio(other, name), 2) for name in own for other in baselines]
        if with_bytes:
            ours = row.seconds.get("ours")
            cells.append(_number(row.bytes / ours * 1e-9 if ours and row.bytes else None, 1))
        table.append(cells)
    return table


def _shares(rows: Sequence[Row]) -> list[list[str]]:
    """The share of the bandwidth of a copy, and how many of the shapes reach which."""
    goal = BANDWIDTH_GOALS[rows[0].mode]
    shares = [1 / row.against["ours"] for row in rows]
    reached = sum(share >= goal for share in shares)
    return [
        ["shape", "share"],
        *([row.shape, _number(share, 2)] for row, share in zip(rows, shares, strict=True)),
        [f"at least {goal:.2f}", f"{reached} of {len(rows)}"],
    ]


def _in_turns(rows: Sequence[Row]) -> list[list[str]]:
    """Time / plain of what was measured in turns with the plain formulation."""
    names = [name for name in ("plain", "two_convolutions", *OWN) if any(name in row.against for row in rows)]
    return [
        ["shape", *(f"{name} / plain" for name in names)],
        *([row.shape, *(_number(row.against.get(name), 2) for name in names)] for row in rows),
    ]


def _means(rows: Sequence[Row]) -> list[list[str]]:
    """Geometric means over groups of one kind and mode, in brackets the smallest; each distinct shape counts once."""
    subsets = {"all": list(rows)}
    if rows[0].kind != "training step":  # where the networks are the rows themselves
        names = sorted({network for row in rows for network in row.networks})
        per_network = {name: [row for row in rows if name in row.networks] for name in names}
        subsets = {
            **per_network,
            **{f"all {case}": [row for row in rows if row.case == case] for case in CASES},
            **subsets,
        }
    pairs = [(other, name) for name in _measured(OWN, rows) for other in _measured(BASELINES, rows)]
    table = [["geometric mean (smallest)", "shapes", *(f"{other}/{name}" for other, name in pairs)]]
    has_depthwise = any(row.case == "depthwise" for row in rows)
    table[0] += [f"{other}/{name}, depthwise" for other, name in pairs if has_depthwise]
    for name, subset in subsets.items():
        if not subset:
            continue
        depthwise = [row for row in subset if row.case == "depthwise"]
        cells = [name, str(len(subset))]
        for chosen in (subset, depthwise) if has_depthwise else (subset,):
            cells += [_mean([row.ratio(*pair) for row in chosen]) for pair in pairs]
        table.append(cells)
    return table


def _mean(ratios: Sequence[float | None]) -> str:
    measured = [ratio for ratio in ratios if ratio is not None]
    return f"{_number(geometric_mean(measured), 2)} ({min(measured):.2f})" if measured else MISSING


def _format(table: list[list[str]], markdown: bool) -> list[str]:
    """The first column to the left, figures to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |" if markdown else "  ".join(cells))
    if markdown:
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        lines.insert(1, f"| {' | '.join(rule)} |")
    else:
        lines.insert(1, "-" * len(lines[0]))
    return lines


def report(run: dict[str, Any], markdown: bool = False) -> str:
    """All tables of one run: details first, geometric means last, where a terminal shows them."""
    rows = read_rows(run)
    heading = "## " if markdown else "== "
    lines = [f"- {line}" for line in _header(run)] if markdown else _header(run)
    lines += ["", LEGEND if markdown else textwrap.fill(LEGEND, 118)]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (KINDS.index(row.kind), row.mode)):
        groups.setdefault((row.kind, row.mode), []).append(row)
    for (kind, mode), members in groups.items():
        lines += ["", f"{heading}{kind}, {mode}", "", *_format(_detail(members), markdown)]
        if kind == "bandwidth":
            lines += ["", f"{heading}{kind}, {mode}, in turns with the copy: medians of copy / ours", ""]
            lines += _format(_shares(members), markdown)
        elif any(row.against for row in members):
            lines += ["", f"{heading}{kind}, in turns with plain: medians of time / plain", ""]
            lines += _format(_in_turns(members), markdown)
    memory = _memory(run)
    if len(memory) > 1:
        lines += [
            "",
            f"{heading}Peak memory in MB, resident above the start of the process and in PyTorch's allocator",
            "",
            *_format(memory, markdown),
        ]
    for (kind, mode), members in groups.items():
        if len(members) > 1:
            lines += ["", f"{heading}Means of {kind}, {mode}", "", *_format(_means(members), markdown)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Ratios measured in one run.")
    parser.add_argument("file", type=Path, help="written by pytest --benchmark-json")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(arguments)
    run = json.loads(options.file.read_text())
    if not run["benchmarks"]:
        print(f"{options.file} holds no measurements", file=sys.stderr)
        return 1
    print(report(run, options.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
