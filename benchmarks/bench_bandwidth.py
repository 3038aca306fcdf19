"""Large 3x3 depthwise convolutions, in turns with a copy of as many bytes: their forward and fused backward operators.

The copy is a ``clone()`` of part of the memory that the convolution reads, so that both find the same of it in the
caches and take what they write from the same allocator.
"""

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
from refconv_kernels.ops import KERNELS, choose

PAIRS = 100
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


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.label)
def test_bandwidth(layer: Layer, mode: str, batch: int, measure: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    geometry = (layer.stride,) * 2, (layer.padding,) * 2, (1, 1)
    size = (layer.height + 2 * layer.padding - layer.kernel_size) // layer.stride + 1
    shapes = (batch, layer.in_channels, layer.height, layer.width), (batch, layer.out_channels, size, size)
    counts = [torch.Size(shape).numel() for shape in shapes]
    memory = torch.randn(sum(counts))
    x, grad = (part.view(shape) for part, shape in zip(memory.split(counts), shapes, strict=True))
    weight = torch.randn(layer.out_channels, 1, 3, 3)
    _check(layer, x, weight, grad)
    kernel = KERNELS["grouped_conv2d"][choose("grouped_conv2d", x, weight, layer.groups, geometry)]

    def ours() -> object:
        if mode == "forward":
            return kernel.forward(x, weight, None, *geometry)
        return kernel.backward(grad, x, weight, *geometry, True, True, False)

    moved = memory.nbytes + (0 if mode == "forward" else x.nbytes)
    copied = memory[: moved // (2 * memory.itemsize)]  # a copy reads and writes
    measure(
        ours,
        against=copied.clone,
        pairs=PAIRS,
        baseline="copy",
        kind="bandwidth",
        mode=mode,
        shape=layer.label,
        case=layer.case,
        networks=LAYERS[layer],
        formulation="ours",
        dtype=torch.float32,
        batch=batch,
        bytes=moved,
    )
