"""One step of AdamW on ``W_r``: PyTorch's on the full form against ``FoldedAdamW`` on ``E``.

The step alone with the gradients given, and what of a training step works on weights: ``W_t``, the gradient of ``W_r``
or ``E`` from that of ``W_t``, and the optimizer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.layers import LAYERS, Layer, distinct
from refconv_kernels import FoldedAdamW, RefConv2d, thin
from refconv_kernels.functional import refocus_weight

NETWORK = "MobileNetV2"
SHAPES = ("dw144_k3", "dw384_k3", "dw576_k3", "dw960_k3", "dw384_k7")
CHECKED_STEPS = 10

#: The layers of one measurement, by its name.
MEASURED: dict[str, list[Layer]] = {
    **{layer.weight_label: [layer] for layer in distinct(weight_only=True) if layer.weight_label in SHAPES},
    NETWORK: [layer for layer in LAYERS if (layer.network, layer.case) == (NETWORK, "depthwise")],
}


def _layer(layer: Layer, dtype: torch.dtype, device: str) -> RefConv2d:
    conv = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, groups=layer.groups, dtype=dtype)
    return RefConv2d.from_conv(conv.to(device), form="thin", init="zeros")


def _adamw(weights: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, weight_decay=0.1, fused=True, capturable=weights[0].is_cuda)


def _folded(layers: list[RefConv2d]) -> FoldedAdamW:
    return FoldedAdamW([layer.transform.weight for layer in layers], nn.ModuleList(layers), weight_decay=0.1)


def _require_same(shape: Layer, dtype: torch.dtype, device: str) -> None:
    """Raise AssertionError unless ``W_t`` after some steps is that of AdamW on ``W_r`` in float64.

    Half of the digits of the largest change must agree, as a different optimizer agrees in none: in float32 the first
    step divides sums that cancel by sums that cancel, so its errors are far above one rounding (docs/numerics.md).
    """
    layer = _layer(shape, dtype, device)
    coordinates, ours = layer.transform.weight, _folded([layer])
    rotation, factor = (matrices[0].to(device) for matrices in thin.decompose(layer.basis_weight, layer.groups, 3))
    full = torch.zeros(len(coordinates), len(rotation), dtype=torch.float64, device=device)
    theirs = _adamw([full])
    mean = 0.3 * torch.randn(len(coordinates), factor.shape[1], dtype=torch.float64, device=device)
    for _ in range(CHECKED_STEPS):
        gradient = (mean + torch.randn_like(mean)) @ factor.T
        coordinates.grad, full.grad = gradient.to(dtype), gradient @ rotation.T
        ours.step()
        theirs.step()
    change = full @ rotation @ factor
    error = (layer.weight.detach().double() - layer.basis_weight).reshape_as(change) - change
    if not error.abs().max() <= torch.finfo(dtype).eps ** 0.5 * change.abs().max():
        raise AssertionError(
            f"ours: W_t is {error.abs().max():.3e} away from float64, changed {change.abs().max():.3e}"
        )


class Case:
    """The optimizers of some layers, with gradients, after a first step that was checked."""

    def __init__(self, name: str, dtype: torch.dtype, device: str = "cpu") -> None:
        torch.manual_seed(0)
        for layer in {layer.weight_label: layer for layer in MEASURED[name]}.values():
            _require_same(layer, dtype, device)
        shapes = [layer for layer in MEASURED[name] for _ in range(layer.count if name == NETWORK else 1)]
        layers = [_layer(layer, dtype, device) for layer in shapes]
        coordinates = [layer.transform.weight for layer in layers]
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        weights = [torch.zeros(layer.out_channels, layer.groups, 3, 3, **factory) for layer in shapes]
        for parameter in (*coordinates, *weights):
            parameter.grad = 0.01 * torch.randn_like(parameter)
        self.layers, self.weights = layers, weights
        self.grads = [torch.randn_like(layer.basis_weight) for layer in layers]
        self.optimizers = {"adamw": _adamw(weights), "ours": _folded(layers)}
        for optimizer in self.optimizers.values():
            optimizer.step()

    def all(self, formulation: str) -> Callable[[], None]:
        """What of a training step works on weights."""
        for weight in self.weights:
            weight.requires_grad_()

        def run() -> None:
            for layer, weight, grad in zip(self.layers, self.weights, self.grads, strict=True):
                if formulation == "ours":
                    layer.transform.weight.grad = None
                    layer.weight.backward(grad)
                else:
                    weight.grad = None
                    refocus_weight(layer.basis_weight, weight).backward(grad)
            self.optimizers[formulation].step()

        return run

    def bytes(self, formulation: str) -> int:
        """Of the state that the optimizer keeps, ``Q`` too."""
        optimizer = self.optimizers[formulation]
        tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
        if isinstance(optimizer, FoldedAdamW):
            tensors += [rotation for _, rotation in optimizer._rotations.values()]
        return sum(tensor.nbytes for tensor in tensors)


# The formulations of one measurement follow each other.
_case = functools.lru_cache(maxsize=1)(Case)


@pytest.mark.parametrize("formulation", ["adamw", "ours"])
@pytest.mark.parametrize("mode", ["step", "W_t+gradient+step"])
@pytest.mark.parametrize("name", MEASURED)
def test_optimizer_step(
    name: str, mode: str, formulation: str, dtype: torch.dtype, measure: Callable[..., Any]
) -> None:
    if dtype != torch.float32:
        pytest.skip("AdamW on W_r in bfloat16 rounds every step away: nothing to compare with")
    case = _case(name, dtype)
    measure(
        case.optimizers[formulation].step if mode == "step" else case.all(formulation),
        kind="optimizer step",
        mode=mode,
        shape=name,
        case="depthwise",
        networks={NETWORK: 1} if name == NETWORK else {},
        formulation=formulation,
        dtype=dtype,
        batch=None,
        bytes=None,
        state_bytes=case.bytes(formulation),
    )
