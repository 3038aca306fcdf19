"""What the Triton kernels compile to, without a GPU: registers, spills, shared memory, instructions.

    python -m benchmarks.compiled_kernels [TARGET ...] [--quick] [--alternatives]

Targets: sm_80, sm_90, sm_100, gfx942; all by default. Each kernel is compiled as the library would launch it for a list
of layers, in every dtype and layout; on demand also in all configurations among which autotuning chooses. A spill or a
kernel that does not compile makes the exit status 1.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # compiled, whatever the tests do

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from refconv_kernels.backends.triton import depthwise, folded_adam, fused, refocus, thin, tuning

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Channels, height and width, kernel size, stride, dilation, channel multiplier.
LAYERS = [
    (144, 56, 3, 1, 1, 1),
    (960, 7, 3, 1, 1, 1),
    (144, 56, 3, 2, 1, 1),
    (120, 28, 5, 1, 1, 1),
    (72, 56, 5, 2, 1, 1),
    (384, 14, 7, 1, 1, 1),
    (64, 28, 3, 1, 2, 2),
    (64, 28, 9, 1, 1, 1),
    (32, 28, 31, 1, 1, 1),
]
#: Shape of the basis, groups.
BASES = [((960, 1, 3, 3), 960), ((384, 1, 7, 7), 384), ((128, 4, 3, 3), 32), ((64, 64, 3, 3), 1), ((24, 8, 5, 5), 2)]

#: Rows of the thin form's coordinates, refocus groups, rank.
ROOTS = [(960, 1, 9), (384, 1, 49), (512, 16, 9), (4096, 1024, 4), (72, 1, 25), (48, 24, 18), (6, 3, 1)]


class _Target:
    """Stands in for Triton's driver: a device that only compiles."""

    def __init__(self, target: GPUTarget, number: int) -> None:
        self.target, self.number = target, number

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """One kernel for one problem on one target."""

    kernel: str
    problem: str
    registers: int
    spilled: int  # bytes of memory per thread; scalar registers that AMD keeps in vector registers are no spills
    shared: int  # bytes
    instructions: int | None  # of the program, each once; loops and what a thread does not reach count like the rest


def problems(quick: bool, turn: int = 0) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names of problems, and calls that launch all kernels of one; the thin form of each comes after the full one.

    With ``quick``, a layer in one layout has one dtype, the other one when ``turn`` is odd instead of even, and both
    steps in one kernel have one size of maps.
    """
    dtypes = [torch.float32, torch.bfloat16] + ([] if quick else [torch.float16, torch.float64])
    for number, (channels, size, kernel, stride, dilation, multiplier) in enumerate(LAYERS[:6:2] if quick else LAYERS):
        pads = [[v, v] for v in (stride, dilation * (kernel // 2), dilation)]
        for dtype in dtypes:
            for layout in (torch.contiguous_format, torch.channels_last):
                # Both dtypes have the same tiles and options; neighbouring targets take one each.
                if quick and (turn + number + (dtype == torch.float32) + (layout == torch.channels_last)) % 2:
                    continue
                x = torch.empty(8, channels, size, size, dtype=dtype).to(memory_format=layout)
                weight = torch.empty(channels * multiplier, 1, kernel, kernel, dtype=dtype)
                y = torch.nn.functional.conv2d(x.to("meta"), weight.to("meta"), None, *pads, groups=channels)
                dy = torch.empty(y.shape, dtype=dtype).to(memory_format=layout)
                name = f"{channels}x{size}x{size} K{kernel} s{stride} d{dilation} m{multiplier} {str(dtype)[6:]}"
                name += " NHWC" if layout is torch.channels_last else " NCHW"
                yield name, partial(depthwise.forward, x, weight, weight[:, 0, 0, 0], *pads)
                yield name, partial(depthwise.backward, dy, x, weight, *pads, True, True, True)
                if not quick or number == 0:
                    yield name, partial(depthwise.backward, dy, x, weight, *pads, True, False, False)
                if not quick:
                    yield name, partial(depthwise.backward, dy, x, weight, *pads, False, True, False)
                if not quick or (kernel, size, stride) == (3, 56, 1):
                    taps = kernel * kernel
                    coordinates = torch.empty(channels * multiplier, taps, dtype=dtype)
                    factor = torch.empty(multiplier, taps, taps, dtype=dtype)
                    form, name = (x, weight, coordinates, factor), name + " thin"
                    yield name, partial(thin.convolution_forward, *form, weight[:, 0, 0, 0], True, *pads)
                    yield name, partial(thin.convolution_backward, dy, *form, True, *pads, True, False, True, True)
                    if not quick:
                        yield name, partial(thin.convolution_forward, *form, None, False, *pads)
                        yield name, partial(thin.convolution_backward, dy, *form, True, *pads, False, True, True, False)
                    if dtype == torch.bfloat16:  # under autocast the parameters keep their type
                        form, name = (x, *(t.float() for t in form[1:])), name + " autocast"
                        yield name, partial(thin.convolution_forward, *form, form[1][:, 0, 0, 0], True, *pads)
                        yield name, partial(thin.convolution_backward, dy, *form, True, *pads, True, False, True, True)
    for dtype in dtypes[:1] if quick else (torch.float32, torch.float64):
        sizes = ((7, 1), (14, 2))
        for size, stride in (sizes[turn % 2],) if quick else sizes:
            x, basis = torch.empty(8, 960, size, size, dtype=dtype), torch.empty(960, 1, 3, 3, dtype=dtype)
            pads = [[v, v] for v in (stride, 1, 1)]
            dy = torch.empty(8, 960, 7, 7, dtype=dtype)
            name = f"960x{size}x{size} K3 s{stride} {str(dtype)[6:]} NCHW"
            yield (
                name,
                partial(
                    fused.forward, x, basis, torch.empty(960, 960, 3, 3, dtype=dtype), basis[:, 0, 0, 0], True, *pads
                ),
            )
            yield name, partial(fused.backward, dy, x, basis, basis, 960, 3, *pads, True, True)
            if dtype == torch.float32:
                x, dy, maps = x.bfloat16(), dy.bfloat16(), torch.empty(960, 960, 3, 3)
                name += " bfloat16 autocast"
                yield name, partial(fused.forward, x, basis, maps, basis[:, 0, 0, 0], True, *pads)
                yield name, partial(fused.backward, dy, x, basis.bfloat16(), basis, 960, 3, *pads, True, True)
    for shape, groups in BASES:
        for dtype in (torch.float32, torch.float64):
            basis = torch.empty(shape, dtype=dtype)
            for map_size in (3,) if quick and dtype == torch.float64 else (3, 5):
                maps = torch.empty(shape[0] * shape[1], groups, map_size, map_size, dtype=dtype)
                name = f"{'x'.join(map(str, shape))} g{groups} k{map_size} {str(dtype)[6:]}"
                yield name, partial(refocus.forward, basis, maps, True)
                if map_size == 3 and dtype == torch.float32:
                    yield f"{name} to bfloat16", partial(refocus.forward, basis, maps, True, torch.bfloat16)
                yield name, partial(refocus.backward, basis, basis, groups, map_size)
            if quick and dtype == torch.float64:
                continue
            kernels, taps = shape[0] * shape[1], shape[2] * shape[3]
            rank = min(9 * groups, taps)
            name = f"{'x'.join(map(str, shape))} g{groups} r{rank} {str(dtype)[6:]}"
            factor = torch.empty(kernels // groups, rank, taps, dtype=dtype)
            yield name, partial(thin.forward, basis, torch.empty(kernels, rank, dtype=dtype), factor, True)
            yield name, partial(thin.backward, basis, factor)
    for rows, groups, rank in ROOTS[:2] if quick else ROOTS:
        for dtype in (torch.float32,) if quick else (torch.float32, torch.float64):
            first, root = torch.empty(rows, rank, dtype=dtype), torch.empty(rows, rank * (rank + 1) // 2, dtype=dtype)
            rotation = torch.empty(groups, rank, 9 * rows // groups, dtype=dtype)
            name = f"{rows} rows, {groups} groups, rank {rank} {str(dtype)[6:]}"
            yield name, partial(folded_adam.folded_adam, first, root, first, rotation, 0.999, 1.0, 1.0, 1e-8)


def compile_for(target: str, quick: bool = False, alternatives: bool = False) -> Iterator[Compiled]:
    """Every kernel that the problems launch, or could with autotuning, compiled for ``target``."""
    driver.set_active(_Target(TARGETS[target], list(TARGETS).index(target)))
    found: dict[int, tuple[str, str, Any]] = {}
    problem = how = ""

    def compile_only(kernel: JITFunction, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            if TARGETS[target].backend != "cuda":
                options.pop("maxnreg", None)  # as the library does on such a device
            compiled = kernel.run(*args, grid=grid, warmup=True, **options)
            found.setdefault(id(compiled), (kernel.fn.__name__, problem + how, compiled))

        return launch

    def launch_all(_problem: Any, _device: Any, rule: tuning.Rule, launch: Callable[..., Any]) -> tuning.Configuration:
        nonlocal how
        default, *others = tuning.alternatives(rule)
        for one in others:
            how = f" {one.rows} rows, {one.block_p}x{one.block_c}, {one.warps} warps"
            launch(one)
        how = ""
        return default

    launch_as_usual, JITFunction.__getitem__ = JITFunction.__getitem__, compile_only
    usual = tuning.choose, tuning.timer
    if alternatives:
        tuning.choose, tuning.timer = launch_all, lambda _: 0.0
    try:
        for problem, call in problems(quick, list(TARGETS).index(target)):  # noqa: B007 (read by compile_only)
            call()
    finally:
        JITFunction.__getitem__ = launch_as_usual
        tuning.choose, tuning.timer = usual
    for kernel, problem, compiled in found.values():
        yield Compiled(kernel, problem, *_resources(compiled.asm, count=not quick))


def _resources(code: Any, count: bool) -> tuple[int, int, int, int | None]:
    """Registers, spills, bytes of shared memory and, on demand, instructions, read from the compiled code."""
    if "amdgcn" in code:
        text = code["amdgcn"]
        keys = ("vgpr_count", "private_segment_fixed_size", "group_segment_fixed_size")
        registers, spilled, shared = (int(re.search(rf"\.{key}:\s*(\d+)", text)[1]) for key in keys)
        return (
            registers,
            spilled,
            shared,
            len(re.findall(r"^\t[sv]_|^\t(?:buffer|global|flat|ds)_", text, re.MULTILINE)) if count else None,
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code["cubin"])
        file.flush()
        what = ["--dump-resource-usage", *(["--dump-sass"] if count else [])]
        command = [triton.knobs.nvidia.cuobjdump.path, *what, file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    keys = ("REG", "STACK", "SHARED", "LOCAL")
    registers, stack, shared, local = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in keys)
    # Every instruction has its address; the branch to itself and the padding behind it do not count.
    addresses = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP|BRA 0x)", text, re.MULTILINE)
    return registers, stack + local, shared, len(addresses) if count else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled_kernels", description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="a few layers and dtypes, without counting instructions")
    parser.add_argument("--alternatives", action="store_true", help="what autotuning chooses among, too")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.targets if name not in TARGETS]
    if unknown:
        parser.error(f"TARGET (={unknown[0]!r}) must be one of {', '.join(TARGETS)}")
    spills = 0
    print(f"triton {triton.__version__}, torch {torch.__version__}")
    for target in options.targets or TARGETS:
        print(f"\n{target}\n{'kernel':24} {'problem':44} registers spilled shared instructions")
        for one in compile_for(target, options.quick, options.alternatives):
            spills += one.spilled > 0
            counted = "-" if one.instructions is None else one.instructions
            figures = f"{one.registers:9} {one.spilled:7} {one.shared:6} {counted:>12}"
            print(f"{one.kernel:24} {one.problem:44} {figures}", flush=True)
    print(f"\n{spills} kernels spill" if spills else "\nno kernel spills")
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
