"""What :func:`~refconv_kernels.refocus` did to a network: layers, parameters, arithmetic, bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from refconv_kernels.convert import check_module, reparameterize, skip_reasons
from refconv_kernels.modules import RefConv2d
from refconv_kernels.ops import use_backend
from refconv_kernels.transforms import RefocusingTransformation, ThinRefocusingTransformation
from refconv_kernels.variants import ParallelRefocusing, StackedRefocusing

__all__ = ["LayerSummary", "Summary", "summary"]

_OURS = (RefocusingTransformation, ThinRefocusingTransformation)
_VARIANTS = (ParallelRefocusing, StackedRefocusing)


@dataclass(frozen=True)
class LayerSummary:
    """One refocused layer. Parameters are counted in numbers, arithmetic in multiply-adds."""

    name: str
    case: str  # "depthwise", "groupwise" or "dense"
    basis_shape: tuple[int, ...]
    basis_trainable: bool
    form: str | None  # "full" or "thin"; None for another transformation than the default
    transform: str  # its class
    transform_parameters: int
    transform_flops: int | None  # per training step, K^2 k^2 C_in C_out in the full form; None for one of the user's


@dataclass(frozen=True)
class Summary:
    """The figures of Table I for one network; ``print`` it for a table.

    ``training_parameters`` counts what is trained (``requires_grad``), as the paper's table does: a frozen
    basis is not in it. ``deployed_parameters`` counts the folded network. FLOPs are multiply-adds, as in the
    paper; ``deployed_flops`` is one forward pass at ``input_size``.
    """

    layers: tuple[LayerSummary, ...]
    skipped: dict[str, str]
    training_parameters: int
    frozen_parameters: int
    deployed_parameters: int
    training_bytes: int  # parameters and buffers, without gradients and optimizer state
    deployed_bytes: int
    transform_flops: int | None  # per training step, whatever the batch
    deployed_flops: int | None  # None without input_size

    def __str__(self) -> str:
        rows = [("layer", "case", "basis weights", "basis", "form", "trained", "multiply-adds")]
        for layer in self.layers:
            flops = "?" if layer.transform_flops is None else f"{layer.transform_flops:,}"
            state = "trainable" if layer.basis_trainable else "frozen"
            shape = "x".join(map(str, layer.basis_shape))
            row = (layer.name or "(model)", layer.case, shape, state, layer.form or layer.transform)
            rows.append((*row, f"{layer.transform_parameters:,}", flops))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        if not self.layers:
            lines = ["no refocused layers"]
        lines += ["", f"left alone: {len(self.skipped)}"]
        lines += [f"  {name or '(model)'}: {reason}" for name, reason in self.skipped.items()]
        mega = 1e-6
        lines += [
            "",
            f"parameters   trained {self.training_parameters * mega:.2f} M,"
            f" frozen {self.frozen_parameters * mega:.2f} M, deployed {self.deployed_parameters * mega:.2f} M",
            f"bytes        training {self.training_bytes * mega:.2f} MB (without gradients and optimizer state),"
            f" deployed {self.deployed_bytes * mega:.2f} MB",
        ]
        if self.transform_flops is not None:
            lines.append(f"arithmetic   transformation {self.transform_flops * mega:,.2f} M multiply-adds per step")
        if self.deployed_flops is not None:
            lines.append(f"             deployed network {self.deployed_flops * mega:,.2f} M multiply-adds per forward")
        return "\n".join(lines)


def summary(model: nn.Module, input_size: Sequence[int] | None = None) -> Summary:
    """Count the parameters, bytes and arithmetic of a network, refocused or not.

    Args:
        model: any module.
        input_size: shape of one input, for example ``(1, 3, 224, 224)``; with it, the multiply-adds of the
            folded network are counted by running it once, in eval mode, on a copy.

    Returns:
        A :class:`Summary`; ``print(summary(model))`` shows it as a table, with what was left alone and why.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> summary(refocus(nn.Conv2d(8, 8, 3, groups=8, bias=False))).training_parameters
        576
    """
    check_module(model)
    refocused = {name: m for name, m in model.named_modules() if isinstance(m, RefConv2d)}
    layers = tuple(_layer(name, layer) for name, layer in refocused.items())
    sizes = [t.map_size for m in refocused.values() if isinstance(t := m.transform, _OURS)]
    skipped = {
        name: reason or ("not selected" if refocused else "can be refocused")
        for name, reason in skip_reasons(model, min(sizes, default=3)).items()
    }
    transforms = [m.transform for m in refocused.values()]
    transform_tensors = {id(t) for m in transforms for t in (*m.parameters(), *m.buffers())}
    parameters = _materialised(model.parameters())
    tensors = [*parameters, *_materialised(model.buffers())]
    flops = [layer.transform_flops for layer in layers]
    return Summary(
        layers=layers,
        skipped=skipped,
        training_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        frozen_parameters=sum(p.numel() for p in parameters if not p.requires_grad),
        deployed_parameters=sum(p.numel() for p in parameters if id(p) not in transform_tensors),
        training_bytes=_bytes(tensors),
        deployed_bytes=_bytes(t for t in tensors if id(t) not in transform_tensors),
        transform_flops=None if None in flops else sum(f for f in flops if f is not None),
        deployed_flops=None if input_size is None else _count_flops(model, input_size),
    )


def _layer(name: str, layer: RefConv2d) -> LayerSummary:
    depthwise = layer.groups == layer.in_channels and layer.groups > 1
    transform, basis = layer.transform, layer.basis_weight
    return LayerSummary(
        name=name,
        case="depthwise" if depthwise else "dense" if layer.groups == 1 else "groupwise",
        basis_shape=tuple(basis.shape),
        basis_trainable=basis.requires_grad,
        form=layer.form,
        transform=type(transform).__name__,
        transform_parameters=sum(p.numel() for p in transform.parameters()),
        transform_flops=_transform_flops(transform, basis[0, 0].numel()),
    )


def _transform_flops(transform: nn.Module, positions: int) -> int | None:
    """Multiply-adds of a transformation of kernels with ``positions`` positions each; None if it is not ours."""
    if isinstance(transform, _OURS):
        return transform.weight.numel() * positions
    if isinstance(transform, _VARIANTS):
        attention = getattr(transform, "attention", None)
        flops = sum(weight.numel() for weight in transform.weights) * positions
        return flops + (0 if attention is None else sum(p.numel() for p in attention.parameters()))
    return None


def _materialised(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t for t in tensors if not nn.parameter.is_lazy(t)]  # a lazy module's have no size yet


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _count_flops(model: nn.Module, input_size: Sequence[int]) -> int:
    folded = reparameterize(model).eval()
    like = next(folded.parameters())
    counter = FlopCounterMode(display=False)
    with use_backend("reference"), torch.no_grad(), counter:
        folded(torch.zeros(tuple(input_size), device=like.device, dtype=like.dtype))
    return counter.get_total_flops() // 2  # PyTorch counts a multiply-add as two
