"""Large 3x3 depthwise convolutions against a copy of as many bytes: their forward and their fused backward alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.agreement import Agreement
from benchmarks.layers import Layer, distinct
from refconv_kernels.functional import conv2d

SMALLEST = 4 << 20  # bytes of the input at the batch of 16
LAYERS = {
    layer: networks
    for layer, networks in distinct().items()
    if layer.case == "depthwise" and layer.kernel_size == 3 and layer.layer_bytes(16, 4, False, False) > 2 * SMALLEST
}


def _check(layer: Layer, x: Tensor, weight: Tensor, grad: Tensor) -> None:
    """Ours and PyTorch's in float32 against float64, on the first two images."""
    options = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}

    def results(run: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x[:2], weight)]
        y = run(*leaves, **options)
        return dict(
            zip(("y", "x", "weight"), (y.detach(), *torch.autograd.grad(y, leaves, grad[:2].to(dtype))), strict=True)
        )

    expected = results(F.conv2d, torch.float64)
    Agreement(expected, results(F.conv2d, torch.float32)).require("ours", results(conv2d, torch.float32))


@pytest.mark.parametrize("formulation", ["copy", "ours"])
@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.label)
def test_bandwidth(layer: Layer, mode: str, formulation: str, batch: int, measure: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    options = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
    x = torch.randn(batch, layer.in_channels, layer.height, layer.width, requires_grad=True)
    weight = torch.randn(layer.out_channels, 1, 3, 3, requires_grad=True)
    y = conv2d(x, weight, **options)
    grad = torch.randn_like(y)
    moved = y.nbytes + x.nbytes * (1 if mode == "forward" else 2)
    source = torch.randn(moved // 8)  # a copy reads and writes
    _check(layer, x, weight, grad)

    def ours() -> object:
        if mode == "forward":
            with torch.no_grad():
                return conv2d(x, weight, **options)
        return torch.autograd.grad(y, [x, weight], grad, retain_graph=True)

    measure(
        source.clone if formulation == "copy" else ours,
        kind="bandwidth",
        mode=mode,
        shape=layer.label,
        case=layer.case,
        networks=LAYERS[layer],
        formulation=formulation,
        dtype=torch.float32,
        batch=batch,
        bytes=moved,
    )
