"""``python -m refconv_kernels``: ``learn``, ``fold`` and ``export`` networks; ``demo``; ``info`` on the backends."""

from __future__ import annotations

import argparse
import platform
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from refconv_kernels import __version__, current_backend, ops
from refconv_kernels.autograd import native
from refconv_kernels.backends import cpu
from refconv_kernels.backends.triton import tuning
from refconv_kernels.learning import cli

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0; 1 for an error; 130 when interrupted.

    Args:
        argv: the arguments, without the program's name; None takes ``sys.argv``.

    Raises:
        SystemExit: arguments that do not parse (code 2), or ``--help``.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "demo":
            return _demo(arguments)
        if arguments.command == "info":
            return _info(arguments)
        return cli.run(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m refconv_kernels", description="Refocusing Learning, and its kernels"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{learn,fold,export,demo,info}")
    cli.add_commands(commands)

    text = "train a baseline on handwritten digits, refocus and train it, fold it, and compare"
    demo = commands.add_parser("demo", help=text, description=text)
    demo.add_argument("--output", type=Path, default=Path("demo"), metavar="DIR", help="folder for the files (demo)")
    demo.add_argument("--seeds", type=_positive, metavar="N", help="repetitions from other random weights (8)")
    demo.add_argument("--epochs", type=_positive, metavar="N", help="epochs of each training (40)")
    demo.add_argument("--quiet", action="store_true", help="a line per training instead of progress bars")

    text = "which backends there are, why one is off, and which one runs a problem"
    info = commands.add_parser("info", help=text, description=text)
    info.add_argument("--problem", choices=list(ops.KERNELS), metavar="OP", help=f"one of {', '.join(ops.KERNELS)}")
    info.add_argument("--shape", type=_shape, metavar="B,C,H,W", help="shape of the input (grouped_conv2d)")
    info.add_argument("--weight", type=_shape, metavar="O,I,H,W", help="shape of the convolution's weight")
    info.add_argument("--groups", type=_positive, metavar="G", help="groups (depthwise if the weight allows it)")
    info.add_argument("--stride", type=_positive, default=1, metavar="S", help="stride, with padding K // 2 (1)")
    info.add_argument("--dtype", default="float32", help="name of a torch dtype (float32)")
    info.add_argument("--channels-last", action="store_true", help="the input is channels_last")
    info.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="of the tensors; cuda needs no GPU (cpu)"
    )
    info.set_defaults(fail=info.error)
    return parser


def _positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(_positive(size) for size in text.split(","))
    if len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} must be four sizes, as in 16,64,56,56")
    return sizes


def _error(message: object) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def _demo(arguments: argparse.Namespace) -> int:
    from refconv_kernels.learning import demo
    from refconv_kernels.learning.errors import LearningError

    numbers = {name: value for name in ("seeds", "epochs") if (value := getattr(arguments, name)) is not None}
    try:
        results = demo.run(arguments.output, quiet=arguments.quiet, **numbers)
    except OSError as error:
        return _error(f"cannot write to {arguments.output}: {error.strerror or error}")
    except LearningError as error:
        return _error(error)
    print(demo.report(results))
    return 0


# --- info ---------------------------------------------------------------------------------------------------


def _info(arguments: argparse.Namespace) -> int:
    if arguments.problem is not None:
        return _problem(arguments)
    described = arguments.shape, arguments.weight, arguments.groups, arguments.channels_last
    if any(described) or arguments.stride > 1 or arguments.device != "cpu":
        options = "--shape, --weight, --groups, --stride, --device and --channels-last"
        arguments.fail(f"{options} describe a --problem: name one")
    print(f"refconv_kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(platform.platform())
    print(f"\nbackend asked for: {current_backend()}\n")
    width = max(map(len, ops.UNAVAILABLE))
    for backend, reason in ops.UNAVAILABLE.items():
        operators = [name for name, kernels in ops.KERNELS.items() if backend in kernels or backend == "reference"]
        state = f"off: {reason}" if reason is not None else f"available: {', '.join(operators)}"
        print(f"{backend:<{width}}  {state}")
    print(f"\nautotuning of Triton's launches: {tuning.describe()}")
    if cpu.native is not None:
        print("\nnative library")
        for name, value in cpu.native.build_info().items():
            print(f"  {name.replace('_', ' ')}: {value}")
        print(f"  instruction sets: {', '.join(cpu.native.instruction_sets())}")
        print(f"  instruction set in use: {cpu.native.instruction_set()}")
        print(f"  autograd Functions: {'in C++' if native.unavailable is None else f'in Python: {native.unavailable}'}")
    return 0


_TWO_STEPS = {
    "refconv2d": "refocus_weight and grouped_conv2d",
    "thin_refconv2d": "thin_refocus_weight and grouped_conv2d",
}


def _problem(arguments: argparse.Namespace) -> int:
    operator = arguments.problem
    try:
        with nullcontext() if arguments.device == "cpu" else FakeTensorMode():
            problem = _tensors(arguments)
        chosen = ops.choose(operator, *problem, optional=operator in (*_TWO_STEPS, "folded_adam", "fused_sgd"))
    except ValueError as error:
        arguments.fail(str(error))
    except (RuntimeError, TypeError) as error:  # more than memory holds; or the backend asked for does not cover it
        return _error(str(error).splitlines()[0])
    if operator in _TWO_STEPS and chosen == "reference":
        chosen = f"two steps (ask about {_TWO_STEPS[operator]})"
    print(f"{operator} runs on: {chosen}")
    width = max(map(len, ops.UNAVAILABLE))
    for backend, off in ops.UNAVAILABLE.items():
        kernel = ops.KERNELS[operator].get(backend)
        if backend == "reference":
            reason = None
        elif off is not None:
            reason = f"off: {off}"
        elif kernel is None:
            reason = f"no {operator} kernel"
        else:
            reason = kernel.limits(*problem)
            slower = kernel.slower(*problem) if reason is None else None
            if slower is not None:
                reason = f"covers it, but auto leaves it: {slower}"
            elif reason is None and kernel.how is not None:
                reason = f"covers it {kernel.how(*problem)}"
        print(f"{backend:<{width}}  {'covers it' if reason is None else reason}")
    return 0


def _tensors(arguments: argparse.Namespace) -> tuple[object, ...]:
    """The problem as the arguments of a kernel's ``limits`` and ``slower``; the tensors are never filled."""
    dtype = getattr(torch, arguments.dtype, None)
    if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or dtype.is_complex):
        raise ValueError(f"--dtype (={arguments.dtype!r}) must be a floating-point type of torch, such as float32")
    weight_shape, groups = arguments.weight, arguments.groups
    if weight_shape is None:
        raise ValueError(f"--problem {arguments.problem} needs --weight")
    groups = groups or (weight_shape[0] if weight_shape[1] == 1 else 1)
    if arguments.problem in ("refocus_weight", "folded_adam") and dtype in (torch.bfloat16, torch.float16):
        dtype = torch.float32  # what halves are transformed in
    factory: dict[str, Any] = {"dtype": dtype, "device": arguments.device}
    weight = torch.empty(weight_shape, **factory)
    kernels, size = weight_shape[0] * weight_shape[1], weight_shape[2] * weight_shape[3]
    transformed: tuple[torch.Tensor, ...] = ()  # what of the transformation
    if arguments.problem != "grouped_conv2d" and kernels % groups != 0:
        raise ValueError(f"--weight has {kernels} kernels, which --groups (={groups}) must divide")
    if arguments.problem in ("refocus_weight", "fused_sgd", "refconv2d"):
        transformed = (torch.empty((kernels, groups, 3, 3), **factory),)
    elif arguments.problem in ("thin_refocus_weight", "thin_refconv2d"):
        rank = min(9 * groups, size)
        transformed = torch.empty((kernels, rank), **factory), torch.empty((kernels // groups, rank, size), **factory)
    elif arguments.problem == "folded_adam":
        transformed = (torch.empty((kernels, min(9 * groups, size)), **factory),)
    if not arguments.problem.endswith("conv2d"):
        if arguments.shape is not None or arguments.channels_last or arguments.stride > 1:
            options = "--shape, --stride and --channels-last"
            raise ValueError(f"--problem {arguments.problem} has no input: leave {options} out")
        return transformed if arguments.problem == "folded_adam" else (weight, *transformed)
    if arguments.shape is None:
        raise ValueError(f"--problem {arguments.problem} needs --shape")
    if arguments.shape[1] != weight_shape[1] * groups:
        needed = f"--weight in {groups} groups needs {weight_shape[1] * groups}"
        raise ValueError(f"--shape has {arguments.shape[1]} channels, but {needed}")
    if weight_shape[0] % groups != 0:
        raise ValueError(f"--weight has {weight_shape[0]} output channels, which --groups (={groups}) must divide")
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    padding = weight_shape[2] // 2, weight_shape[3] // 2
    input = torch.empty(arguments.shape, memory_format=layout, **factory)
    return input, weight, *transformed, groups, ((arguments.stride,) * 2, padding, (1, 1))


if __name__ == "__main__":
    sys.exit(main())
