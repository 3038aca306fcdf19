"""A trained network as a program that runs without this package: ONNX or ``torch.export``."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refconv_kernels.learning import models
from refconv_kernels.learning.arms import ARMS
from refconv_kernels.learning.checkpoint import read_weights, write_file
from refconv_kernels.learning.errors import CheckFailed, CheckpointError, MissingExtra, SettingsError, require
from refconv_kernels.learning.fold import fold_weights

__all__ = ["export"]


def export(
    source: Path,
    output: Path,
    *,
    model: str | None = None,
    classes: int | None = None,
    shape: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Fold a network and write it as a program with a free batch size: ``python -m refconv_kernels export``.

    The program takes ``(image - mean) / std``, as the network did in training, and gives logits.

    Args:
        source: a checkpoint or the folder of a training; or a ``state_dict`` of anything that
            :func:`~refconv_kernels.learning.fold.fold_file` takes.
        output: ``.onnx`` or, for ``torch.export``, ``.pt2``.
        model: as :func:`~refconv_kernels.learning.models.build` takes it; None takes the checkpoint's.
        classes, shape: number of classes, and (C, H, W) of the images; None takes the checkpoint's.

    Returns:
        ``difference``: largest difference of a logit between the program and the network, None where nothing here can
        run it (ONNX without onnxruntime); ``mean`` and ``std`` of the training, None if unknown.

    Raises:
        SettingsError: what the file does not say was not given.
        CheckpointError: a file cannot be read or written, or does not fit the model.
        CheckFailed: the program does not compute what the network does; it is not kept.
        MissingExtra: onnx or onnxscript is not installed.
    """
    if output.suffix not in (".onnx", ".pt2"):
        raise CheckpointError(f"output (={str(output)!r}) must end in .onnx or .pt2")
    weights, about = read_weights(source)
    model = model or about.get("settings", {}).get("model")
    classes = classes or (len(about["classes"]) if "classes" in about else None)
    shape = shape or about.get("shape")
    if model is None or classes is None or shape is None:
        raise SettingsError(f"{source} does not say what network it is: give --model, --classes and --shape")
    arm = ARMS.get(about.get("arm", ""))
    identity = arm is None or arm.options.get("identity", True)
    weights, _ = fold_weights(weights, identity=identity, transform=None if arm is None else arm.transform)
    network = models.build(model, shape[0], classes)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{source} does not fit the model {model!r}: {error}") from error
    network.eval()
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    write = _to_onnx if output.suffix == ".onnx" else _to_program
    return {
        "difference": write(network, images, output),
        "mean": about.get("mean"),
        "std": about.get("std"),
    }


def _to_program(network: nn.Module, images: Tensor, output: Path) -> float:
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    buffer = io.BytesIO()  # on a full disk torch's own writer ends the process
    torch.export.save(program, buffer)
    difference = _check(network, images, torch.export.load(buffer).module())
    write_file(output, lambda to: to.write_bytes(buffer.getbuffer()))
    return difference


def _to_onnx(network: nn.Module, images: Tensor, output: Path) -> float | None:
    for package in ("onnx", "onnxscript"):
        require(package, extra="export")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, about itself
        program = torch.onnx.export(
            network,
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
    assert program is not None

    def write(to: Path) -> float | None:
        program.save(str(to), external_data=False)
        try:
            runtime = require("onnxruntime")
        except MissingExtra:
            return None
        session = runtime.InferenceSession(str(to), providers=["CPUExecutionProvider"])
        return _check(network, images, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]))

    return write_file(output, write)


@torch.no_grad()
def _check(network: nn.Module, images: Tensor, program: Any) -> float:
    largest = 0.0
    for batch in (images, images[:1]):  # another batch size than the one it was traced with
        expected = network(batch)
        difference = (program(batch) - expected).abs().max().item()
        limit = 1e-4 * max(1.0, expected.abs().max().item())
        if not difference <= limit:
            raise CheckFailed(f"the exported program differs by {difference:.3g}; rounding explains {limit:.3g}")
        largest = max(largest, difference)
    return largest
