"""A network trained by ``torch.optim.SGD`` and by ``FusedSGD``, side by side."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from refconv_kernels import FusedSGD, RefConv2d, refocus
from refconv_kernels.autograd import DeferredGradient


def network(dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    """Dense layers with 24, 160 and 64 kernels, which straddle the vectors and blocks of the step, a depthwise one, and others."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 20, 3, padding=1, bias=False),
        nn.Tanh(),
        nn.Conv2d(20, 20, 3, groups=20),
        nn.Conv2d(20, 4, 1),
        nn.Conv2d(4, 16, 3, padding=1, padding_mode="circular"),
    )
    return refocus(model.to(dtype), **options)


def both(model: nn.Module, lr: float = 0.05, **options: Any) -> tuple[tuple[nn.Module, torch.optim.Optimizer], ...]:
    """The same model twice, for PyTorch's optimizer and ours."""
    ours = copy.deepcopy(model)
    return (
        (model, torch.optim.SGD(model.parameters(), lr=lr, **options)),
        (ours, FusedSGD(ours.parameters(), ours, lr=lr, **options)),
    )


def images(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 8, 7, dtype=dtype, generator=torch.Generator().manual_seed(step))


def backward(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4, first: int = 0) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, images(step, dtype))
        optimizer.step()


def stepped() -> tuple[RefConv2d, FusedSGD]:
    """A layer whose next gradient is deferred, and its optimizer."""
    torch.manual_seed(4)
    layer = RefConv2d(3, 4, 3, padding=1, dtype=torch.float64)
    optimizer = FusedSGD(layer.parameters(), layer, lr=0.1)
    train(layer, optimizer, 1)
    optimizer.zero_grad()
    return layer, optimizer


def deferred(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if isinstance(p.grad, DeferredGradient)]


def assert_same(ours: nn.Module, other: nn.Module, **tolerance: float) -> None:
    torch.testing.assert_close(ours.state_dict(), other.state_dict(), **tolerance)


FUSED = [f"{index}.transform.weight" for index in (0, 2, 4, 6)]
