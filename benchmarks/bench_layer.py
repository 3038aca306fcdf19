"""One layer, as it runs in training: forward, and forward and backward (``dx`` and the gradient of what is trained)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.agreement import Agreement, one_thread
from benchmarks.formulations import FORMULATIONS, as_full, float64_reference, layer_formulations
from benchmarks.layers import Layer, distinct

LAYERS = distinct()
CHANNELS_LAST = {"MobileNetV2", "ConvNeXt-T"}  # the networks measured in that memory format too


class _Case:
    """The formulations of one layer, their input, and the agreement required of them."""

    def __init__(self, layer: Layer, layout: torch.memory_format, batch: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        arguments = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding
        self.modules = layer_formulations(nn.Conv2d(*arguments, groups=layer.groups, bias=False, dtype=dtype))
        input = torch.randn(batch, layer.in_channels, layer.height, layer.width, dtype=dtype)
        self.input = input.contiguous(memory_format=layout)
        self.input.requires_grad_(not layer.is_stem)
        self.grad = torch.randn_like(self.modules["plain"](self.input))
        exact = float64_reference(self.modules["two_convolutions"])
        with one_thread():
            expected = self.results(exact, self.input.detach().double().requires_grad_(self.input.requires_grad))
        self.agreement = Agreement(expected, self.results(self.modules["two_convolutions"], self.input))

    def results(self, module: nn.Module, input: Tensor) -> dict[str, Tensor]:
        """The output and all gradients, by name; the plain convolution's weight is not the other ones' parameter."""
        wanted = self.wanted(module, input)
        output = module(input)
        grads = torch.autograd.grad(output, list(wanted.values()), self.grad.to(output.dtype))
        return {"y": output.detach(), **as_full(module, dict(zip(wanted, grads, strict=True)))}

    @staticmethod
    def wanted(module: nn.Module, input: Tensor) -> dict[str, Tensor]:
        """What gets a gradient, by name."""
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        return {**named, "x": input} if input.requires_grad else named


# The formulations of one layer are measured one after the other.
_case = functools.lru_cache(maxsize=1)(_Case)


def _measure(
    layer: Layer,
    layout: torch.memory_format,
    mode: str,
    formulation: str,
    batch: int,
    dtype: torch.dtype,
    measure: Callable[..., Any],
) -> None:
    case = _case(layer, layout, batch, dtype)
    module, input = case.modules[formulation], case.input
    case.agreement.require(formulation, case.results(module, input))
    wanted = list(case.wanted(module, input).values())

    def forward() -> Tensor:
        return module(input)

    def both() -> object:
        return torch.autograd.grad(module(input), wanted, case.grad)

    measure(
        forward if mode == "forward" else both,
        kind="layer",
        mode=mode if layout is torch.contiguous_format else f"{mode}, channels_last",
        shape=layer.label,
        case=layer.case,
        networks=LAYERS[layer],
        formulation=formulation,
        dtype=dtype,
        batch=batch,
        bytes=layer.layer_bytes(batch, dtype.itemsize, mode != "forward", formulation in ("two_convolutions", "ours")),
    )


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.label)
def test_layer(
    layer: Layer, mode: str, formulation: str, batch: int, dtype: torch.dtype, measure: Callable[..., Any]
) -> None:
    _measure(layer, torch.contiguous_format, mode, formulation, batch, dtype, measure)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize(
    "layer",
    [layer for layer, networks in LAYERS.items() if layer.case == "depthwise" and set(networks) & CHANNELS_LAST],
    ids=lambda layer: layer.label,
)
def test_layer_channels_last(
    layer: Layer, mode: str, formulation: str, batch: int, dtype: torch.dtype, measure: Callable[..., Any]
) -> None:
    _measure(layer, torch.channels_last, mode, formulation, batch, dtype, measure)
