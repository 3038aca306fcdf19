"""The commands ``learn``, ``fold`` and ``export`` of ``python -m refconv_kernels``."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from refconv_kernels.learning import settings as options
from refconv_kernels.learning.arms import ARMS
from refconv_kernels.learning.errors import LearningError, SettingsError
from refconv_kernels.learning.settings import Settings
from refconv_kernels.learning.signals import Stopped

__all__ = ["add_commands", "run"]


def add_commands(commands: Any) -> None:
    """Add the parsers; each sets ``run``, a function from its arguments to the exit code."""
    text = "pretrain or load, refocus, train, fold, evaluate, save"
    arms = "\n".join(f"  {name:<24}{arm.text}" for name, arm in ARMS.items())
    learn = commands.add_parser(
        "learn",
        help=text,
        description=f"{text[0].upper()}{text[1:]}. 'learn compare' does so for several arms and seeds.",
        epilog=f"arms:\n{arms}\n\nEvery option is also a line of the TOML file, under its name with underscores;\n"
        "those of the recipe in the section [recipe], those of learn compare in [compare].\n"
        "Several processes: torchrun --nproc-per-node N -m refconv_kernels learn ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    learn.add_argument("action", nargs="?", choices=("compare",), help="compare arms over several seeds")
    learn.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in this folder")
    learn.add_argument("--quiet", action="store_true", help="no progress bars")
    options.add_options(learn)
    learn.set_defaults(run=_learn, fail=learn.error)

    text = "from a checkpoint of a refocused network to the weights of the plain one"
    fold = commands.add_parser("fold", help=text, description=text)
    fold.add_argument("checkpoint", type=Path, help="file (.safetensors, .pth) or folder of a training")
    fold.add_argument("-o", "--output", type=Path, required=True, help="file to write (.safetensors, .pth)")
    fold.add_argument(
        "--no-identity", action="store_true", help="the layers have no identity (where the file does not say)"
    )
    fold.set_defaults(run=_fold)

    text = "fold a checkpoint and write the network as ONNX or a torch.export program"
    export = commands.add_parser("export", help=text, description=text)
    export.add_argument("checkpoint", type=Path, help="file (.safetensors, .pth) or folder of a training")
    export.add_argument("-o", "--output", type=Path, required=True, help="file to write (.onnx, .pt2)")
    export.add_argument("--model", help="as for learn, where the file does not say")
    export.add_argument("--classes", type=int, metavar="N", help="number of classes, where the file does not say")
    export.add_argument("--shape", type=int, nargs=3, metavar=("C", "H", "W"), help="of an image, where unsaid")
    export.set_defaults(run=_export)


def run(arguments: argparse.Namespace) -> int:
    """Run a command; errors that the user can mend become one line and exit code 1."""
    command: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return command(arguments)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except LearningError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _learn(arguments: argparse.Namespace) -> int:
    from refconv_kernels.learning import experiment, run

    resume = arguments.resume is not None
    if resume:
        if arguments.config is not None or hasattr(arguments, "output"):
            arguments.fail("--resume takes settings and folder from the run: leave --config and --output out")
        arguments.config = arguments.resume / "settings.toml"
        if not arguments.config.exists():
            raise SettingsError(f"{arguments.resume} holds no run to go on with (no settings.toml)")
    settings: Settings = options.from_options(arguments)
    if resume:
        settings = replace(settings, output=str(arguments.resume))
    if arguments.action == "compare":
        summary = experiment.run_comparison(settings, resume=resume, quiet=arguments.quiet)
        print(experiment.report(summary))
        print(f"\nWrote {settings.output}/comparison.txt, comparison.json, curves.png")
        return 0
    result = run.learn(settings, resume=resume, quiet=arguments.quiet)
    if result["rank"] == 0:
        print(_told(settings, result))
    return 0


def _told(settings: Settings, result: dict[str, Any]) -> str:
    folder = Path(settings.output)
    given = settings.arm == "baseline" and settings.pretrained is not None
    text = "the network as it was given" if given else ARMS[settings.arm].text
    lines = [
        f"{settings.arm}: {text}; {result['images']} training images of {result['data']}",
        f"test accuracy after the last epoch: {result['accuracy']:.2f} %"
        + (f" (baseline: {result['baseline_accuracy']:.2f} %)" if result["baseline_accuracy"] is not None else ""),
        f"parameters: {result['training_parameters']:,} trained, {result['deployed_parameters']:,} deployed",
        f"folded: logits differ by at most {result['fold_difference']:.1g}",
        f"weights of the plain network: {folder / settings.arm / 'folded.safetensors'}",
        f"logs, curves, checkpoint: {folder / settings.arm}",
    ]
    return "\n".join(textwrap.fill(line, 118, subsequent_indent="  ", break_long_words=False) for line in lines)


def _fold(arguments: argparse.Namespace) -> int:
    from refconv_kernels.learning.fold import fold_file

    layers = fold_file(arguments.checkpoint, arguments.output, identity=False if arguments.no_identity else None)
    plural = "" if layers == 1 else "s"
    print(f"folded {layers} layer{plural} into {arguments.output}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from refconv_kernels.learning.export import export

    found = export(
        arguments.checkpoint,
        arguments.output,
        model=arguments.model,
        classes=arguments.classes,
        shape=arguments.shape,
    )
    print(f"wrote {arguments.output}: images [B, C, H, W] to logits [B, classes]")
    if found["mean"] is not None:
        mean, std = (", ".join(f"{value:.4f}" for value in found[name]) for name in ("mean", "std"))
        print(f"it expects (image - mean) / std of images from 0 to 1, mean {mean}, std {std}")
    if found["difference"] is None:
        print("not checked: onnxruntime is not installed")
    else:
        print(f"checked: its logits differ from the network's by at most {found['difference']:.1g}")
    return 0
