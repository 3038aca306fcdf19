"""Tests, then every figure of the GPU kernels: ``python -m benchmarks.gpu_report``, within ten minutes on one GPU.

Runs the tests of the Triton kernels and stops if one fails. Then measures layers and weight transforms (kernel times:
CUDA graphs, caches flushed, medians of events) and whole training steps, against plain convolutions, the
two-convolution formulation, eager and compiled, and a ``clone()`` of as many bytes; ours in the full form ("ours") and,
where that has fewer numbers, in the thin one. And ``FoldedAdamW`` on the thin form against PyTorch's fused AdamW on
``W_r``. All but the training steps is checked against float64 before it is measured.
Writes ``benchmarks/results/<gpu>.json`` and prints its table.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, nn

from benchmarks import bench_folded_adam
from benchmarks.agreement import Agreement
from benchmarks.formulations import as_full, float64_reference, layer_formulations, network_formulations
from benchmarks.layers import LAYERS, Layer
from benchmarks.networks import ConvNeXtTiny, MobileNetV2, ResNet18, training_step

_TESTS = tuple(f"tests/test_triton{part}.py" for part in ("", "_thin", "_folded", "_tuning"))
ROUNDS = 15
FLUSH_BYTES = 256 << 20  # more than any GPU's L2 cache
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # bfloat16: autocast over float32 parameters
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "MobileNetV2_b128_224px": (MobileNetV2, 128, 224),
    "ConvNeXt-T_b128_224px": (ConvNeXtTiny, 128, 224),
    "ResNet-18_b256_224px": (ResNet18, 256, 224),
}
Row = dict[str, Any]


class Timer:
    """Medians of milliseconds on one device; the CPU is for tests of this file."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self._flush = torch.empty(FLUSH_BYTES if self.cuda else 1, dtype=torch.int8, device=device)

    def kernels(self, call: Callable[[], object]) -> float:
        """Time on the device alone: the call is captured once and replayed."""
        if not self.cuda:
            return self.wall(call)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        times = []
        for _ in range(ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)

    def wall(self, call: Callable[[], object]) -> float:
        """Time that passes, Python and launches included."""
        for _ in range(3):
            call()
        times = []
        for _ in range(ROUNDS):
            self._wait()
            start = time.perf_counter()
            call()
            self._wait()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def _autocast(dtype: torch.dtype, device: str) -> AbstractContextManager[Any]:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype)


class _Problem:
    """The formulations of one layer on one device, their input and cotangent."""

    def __init__(self, layer: Layer, batch: int, dtype: torch.dtype, layout: torch.memory_format, device: str) -> None:
        torch.manual_seed(0)
        self.dtype, self.device = dtype, device
        arguments = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding
        conv = nn.Conv2d(*arguments, groups=layer.groups, bias=False).to(device)
        self.modules = layer_formulations(conv)
        if self.modules["thin"].form != "thin":  # the forms are one
            del self.modules["thin"]
        x = torch.randn(batch, layer.in_channels, layer.height, layer.width, device=device, dtype=dtype)
        self.input = x.contiguous(memory_format=layout).requires_grad_(not layer.is_stem)
        with torch.no_grad(), _autocast(dtype, device):
            y = self.modules["plain"](self.input)
        self.grad = torch.randn_like(y)
        self.bytes = layer.layer_bytes(batch, self.input.element_size(), backward=False, refocused=False)

    def forward(self, module: nn.Module) -> Tensor:
        with torch.no_grad(), _autocast(self.dtype, self.device):
            return module(self.input)

    def training(self, module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The output and all gradients, by name; in ``dtype`` throughout if one is given."""
        x = self.input if dtype is None else self.input.detach().to(dtype).requires_grad_(self.input.requires_grad)
        wanted = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if x.requires_grad:
            wanted["x"] = x
        with _autocast(self.dtype, self.device) if dtype is None else nullcontext():
            y = module(x)
        grads = torch.autograd.grad(y, list(wanted.values()), self.grad.to(y.dtype))
        return {"y": y.detach(), **as_full(module, dict(zip(wanted, grads, strict=True)))}

    def check(self) -> None:
        """Raise AssertionError unless ours is as near to float64 as the two convolutions are."""
        expected = self.training(float64_reference(self.modules["two_convolutions"]), torch.float64)
        agreement = Agreement(expected, self.training(self.modules["two_convolutions"]))
        for formulation in ("ours", "thin"):
            if formulation in self.modules:
                agreement.require(formulation, self.training(self.modules[formulation]))


def _clone(timer: Timer, bytes_moved: int, device: str) -> float:
    """Milliseconds of a clone() that reads and writes as many bytes together."""
    source = torch.empty(bytes_moved // 2, dtype=torch.int8, device=device)
    return timer.kernels(source.clone)


def layers(timer: Timer, device: str, batch: int, chosen: list[Layer], compiled: int) -> Iterator[Row]:
    """Forward and forward + backward of every layer, dtype and layout; compiled formulations for the first few."""
    for dtype_name, dtype in DTYPES.items():
        for layout_name, layout in LAYOUTS.items():
            for number, layer in enumerate(chosen):
                problem = _Problem(layer, batch, dtype, layout, device)
                problem.check()
                modules = dict(problem.modules)
                if number < compiled:
                    modules["two_convolutions_compiled"] = torch.compile(problem.modules["two_convolutions"])
                # Forward reads x, writes y; backward reads x and dy, writes dx.
                x_bytes = problem.input.nbytes
                passes = {"forward": problem.bytes, "forward+backward": 2 * problem.bytes + x_bytes}
                for mode, call in (("forward", problem.forward), ("forward+backward", problem.training)):
                    times = {name: timer.kernels(lambda m=m, c=call: c(m)) for name, m in modules.items()}
                    times["clone"] = _clone(timer, passes[mode], device)
                    yield {
                        "kind": "layer", "mode": mode, "shape": layer.label, "network": layer.network, "batch": batch,
                        "dtype": dtype_name, "layout": layout_name, "bytes": passes[mode], "ms": times,
                    }  # fmt: skip


def _check_transforms(ours: nn.Module, other: nn.Module, cotangent: Tensor) -> None:
    """Raise AssertionError unless our transformation is as near to float64 as the convolution is."""

    def results(weight: Tensor, module: nn.Module) -> dict[str, Tensor]:
        (grad,) = torch.autograd.grad(weight, module.transform.weight, cotangent.to(weight.dtype))
        return {"W_t": weight.detach(), "dW_r": grad}

    exact = float64_reference(other)
    agreement = Agreement(results(exact.transformed_weight(), exact), results(other.transformed_weight(), other))
    agreement.require("ours", results(ours.weight, ours))


def transforms(timer: Timer, device: str, chosen: list[Layer]) -> Iterator[Row]:
    """W_t from W_r, and dW_r from dW_t, in float32."""
    for layer in {layer.weight_label: layer for layer in chosen}.values():
        conv = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, groups=layer.groups, bias=False)
        modules = layer_formulations(conv.to(device))
        ours, other = modules["ours"], modules["two_convolutions"]
        cotangent = torch.randn_like(ours.basis_weight)
        _check_transforms(ours, other, cotangent)
        calls = {"ours": lambda m=ours: m.weight, "two_convolutions": other.transformed_weight}
        for mode in ("forward", "forward+backward"):

            def run(name: str, mode: str = mode, calls: Any = calls, modules: Any = modules, g: Any = cotangent) -> Any:
                weight = calls[name]()
                return weight if mode == "forward" else torch.autograd.grad(weight, modules[name].transform.weight, g)

            times = {name: timer.kernels(lambda n=name, r=run: r(n)) for name in calls}
            moved = layer.transform_bytes(4, backward=mode != "forward")
            times["clone"] = _clone(timer, moved, device)
            yield {"kind": "transform", "mode": mode, "shape": layer.weight_label, "network": layer.network,
                   "dtype": "float32", "layout": "-", "bytes": moved, "ms": times}  # fmt: skip


def optimizers(timer: Timer, device: str, names: Iterable[str]) -> Iterator[Row]:
    """FoldedAdamW against AdamW on W_r, float32: its kernels, with what Python takes, and with W_t and its gradient."""
    for name in names:
        case = bench_folded_adam.Case(name, torch.float32, device)
        state = {formulation: case.bytes(formulation) for formulation in case.optimizers}
        step = {formulation: optimizer.step for formulation, optimizer in case.optimizers.items()}
        for mode, measured, calls in (
            ("step, kernels", timer.kernels, step),
            ("step", timer.wall, step),
            ("W_t+gradient+step", timer.wall, {formulation: case.all(formulation) for formulation in step}),
        ):
            yield {"kind": "optimizer", "mode": mode, "shape": name, "network": "-", "dtype": "float32", "layout": "-",
                   "ms": {formulation: measured(call) for formulation, call in calls.items()},
                   "state_bytes": state}  # fmt: skip


def steps(timer: Timer, device: str, networks: dict[str, Any]) -> Iterator[Row]:
    """Whole training steps with fused SGD: milliseconds and peak bytes."""
    for name, (build, batch, size) in networks.items():
        for dtype_name, dtype in DTYPES.items():
            for layout_name, layout in LAYOUTS.items():
                torch.manual_seed(0)
                times, peaks = {}, {}
                for formulation, model in network_formulations(build()).items():
                    model = model.to(device, memory_format=layout)
                    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=layout)
                    labels = torch.randint(1000, (batch,), device=device)
                    step = training_step(model, images, labels)
                    if timer.cuda:
                        torch.cuda.reset_peak_memory_stats()
                    with _autocast(dtype, device):
                        times[formulation] = timer.wall(step)
                    peaks[formulation] = torch.cuda.max_memory_allocated() if timer.cuda else 0
                    del model, step
                    if timer.cuda:
                        torch.cuda.empty_cache()
                yield {"kind": "step", "mode": "step", "shape": name, "network": name, "dtype": dtype_name,
                       "layout": layout_name, "ms": times, "peak_bytes": peaks}  # fmt: skip


def table(rows: list[Row]) -> str:
    """Milliseconds, and ratios to ours, as Markdown."""
    lines = []
    for kind in ("layer", "transform", "optimizer", "step"):
        chosen = [row for row in rows if row["kind"] == kind]
        names = sorted({name for row in chosen for name in row["ms"]} - {"ours"})
        if not chosen:
            continue
        lines += [
            f"\n## {kind}\n",
            f"| shape | mode | dtype | layout | ours, ms | {' | '.join(n + '/ours' for n in names)} |",
        ]
        lines += ["|---|---|---|---|---:|" + "---:|" * len(names)]
        for row in chosen:
            ours = row["ms"]["ours"]
            ratios = [f"{row['ms'][name] / ours:.2f}" if name in row["ms"] else "-" for name in names]
            facts = [row["shape"], row["mode"], row["dtype"], row["layout"], f"{ours:.3f}", *ratios]
            lines.append(f"| {' | '.join(facts)} |")
    return "\n".join(lines)


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="stop measuring after that long (default 8)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    if subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *_TESTS]).returncode != 0:
        print("no figures: a test failed", file=sys.stderr)
        return 1
    started, timer, rows, unfinished = time.monotonic(), Timer("cuda"), [], False
    depthwise = [layer for layer in LAYERS if layer.network in ("MobileNetV2", "ConvNeXt-T") and not layer.is_stem]
    dense = [layer for layer in LAYERS if layer.network == "ResNet-18" and not layer.is_stem]
    parts = [
        transforms(timer, "cuda", depthwise + dense),
        optimizers(timer, "cuda", bench_folded_adam.MEASURED),
        layers(timer, "cuda", 128, depthwise, compiled=2),
        steps(timer, "cuda", NETWORKS),
    ]
    for share, part in zip((0.15, 0.2, 0.7, 1.0), parts, strict=True):  # of the time, at the end of each part
        for row in part:
            rows.append(row)
            if time.monotonic() - started > 60 * options.minutes * share:
                unfinished = True
                break
    device = torch.cuda.get_device_name()
    facts = {
        "device": device, "commit": _commit(), "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "hip": torch.version.hip, "python": sys.version.split()[0],
        "unfinished": unfinished, "rounds": ROUNDS,
    }  # fmt: skip
    path = Path(__file__).parent / "results" / f"{re.sub(r'[^a-z0-9]+', '-', device.lower())}.json"
    path.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), table(rows), f"\nwritten: {path}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
