"""The feature-map convolution alone, against PyTorch's: what networks seldom have, and other dtypes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.agreement import Agreement, one_thread
from refconv_kernels.functional import conv2d

CHECKED = 2  # images: PyTorch's float64 convolutions take long


@dataclass(frozen=True)
class Problem:
    """A convolution with square kernels and maps, padded by half a kernel."""

    channels: int
    size: int
    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    multiplier: int = 1
    per_group: int = 1
    dtype: torch.dtype = torch.float32
    images: int = 1  # times those of the other problems

    @property
    def label(self) -> str:
        """The sizes, and what is unusual, as in ``dw144_k3s3_56x56`` and ``dw96_k4s1_28x28_bfloat16``."""
        name = f"dw{self.channels}" if self.per_group == 1 else f"{self.channels}g{self.channels // self.per_group}"
        name += f"_k{self.kernel}s{self.stride}_{self.size}x{self.size}"
        name += f"_d{self.dilation}" if self.dilation > 1 else ""
        name += f"_m{self.multiplier}" if self.multiplier > 1 else ""
        name += f"_{self.images}batches" if self.images > 1 else ""
        return name + ("" if self.dtype == torch.float32 else f"_{self.dtype}".replace("torch.", ""))

    @property
    def options(self) -> dict[str, int]:
        padding = self.dilation * (self.kernel // 2)
        groups = self.channels // self.per_group
        return {"stride": self.stride, "padding": padding, "dilation": self.dilation, "groups": groups}


PROBLEMS = [
    *(Problem(240, 14, kernel) for kernel in (1, 2)),
    *(Problem(96, 28, kernel) for kernel in (4, 6, 9, 13)),
    Problem(32, 28, 31),
    Problem(144, 56, 3, stride=3),
    Problem(96, 56, 4, stride=4),
    Problem(96, 56, 7, stride=4),
    Problem(144, 28, 3, dilation=2),
    Problem(144, 56, 3, stride=2, dilation=2),
    Problem(120, 28, 5, dilation=2),
    *(Problem(channels, 28, multiplier=multiplier) for channels, multiplier in ((96, 2), (16, 8))),
    *(Problem(128, 28, per_group=per_group) for per_group in (2, 4)),
    Problem(480, 7, 5, per_group=4),
    *(Problem(channels, size, images=images) for channels, size, images in ((576, 14, 4), (960, 7, 8))),
    Problem(58, 28),
    *(
        Problem(channels, size, kernel, stride, dtype=torch.bfloat16)
        for channels, size, kernel, stride in (
            (240, 14, 1, 1),
            (96, 28, 4, 1),
            (144, 56, 3, 1),
            (144, 56, 3, 2),
            (144, 56, 3, 3),
            (100, 14, 3, 1),
            (120, 28, 5, 1),
            (384, 14, 7, 1),
        )
    ),
    Problem(144, 28, dtype=torch.float16),
    *(Problem(144, 28, kernel, dtype=torch.float64) for kernel in (3, 5)),
]
FORMULATIONS: dict[str, Callable[..., Tensor]] = {"plain": F.conv2d, "ours": conv2d}


def _tensors(problem: Problem, batch: int, layout: torch.memory_format) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and the gradient of the output."""
    torch.manual_seed(0)
    x = torch.randn(batch, problem.channels, problem.size, problem.size, dtype=problem.dtype)
    shape = problem.channels * problem.multiplier, problem.per_group, problem.kernel, problem.kernel
    weight = torch.randn(shape, dtype=problem.dtype)
    y = F.conv2d(x.to("meta"), weight.to("meta"), None, **problem.options)
    grad = torch.randn(y.shape).to(problem.dtype)
    return x.contiguous(memory_format=layout).requires_grad_(), weight.requires_grad_(), grad.to(memory_format=layout)


def _check(problem: Problem, x: Tensor, weight: Tensor, grad: Tensor) -> None:
    """Ours and PyTorch's against float64, on the first images; on all where their number is what is unusual."""
    checked = CHECKED if problem.images == 1 else len(x)

    def results(run: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x[:checked], weight)]
        y = run(*leaves, None, **problem.options)
        gradients = torch.autograd.grad(y, leaves, grad[:checked].to(dtype))
        return dict(zip(("y", "x", "weight"), (y.detach(), *gradients), strict=True))

    with one_thread():
        expected = results(F.conv2d, torch.float64)
    window = problem.kernel**2 * problem.per_group
    terms = {"y": window, "x": window * problem.multiplier, "weight": grad[:checked, 0].numel()}
    Agreement(expected, results(F.conv2d, problem.dtype), terms).require("ours", results(conv2d, problem.dtype))


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.label)
def test_convolution(
    problem: Problem,
    layout: torch.memory_format,
    mode: str,
    formulation: str,
    batch: int,
    measure: Callable[..., Any],
) -> None:
    batch *= problem.images
    x, weight, grad = _tensors(problem, batch, layout)
    if formulation == "ours":
        _check(problem, x, weight, grad)
    run = FORMULATIONS[formulation]

    def forward() -> Tensor:
        with torch.no_grad():
            return run(x, weight, None, **problem.options)

    def both() -> object:
        return torch.autograd.grad(run(x, weight, None, **problem.options), (x, weight), grad)

    measure(
        forward if mode == "forward" else both,
        kind="convolution",
        mode=mode if layout is torch.contiguous_format else f"{mode}, channels_last",
        shape=problem.label,
        case="depthwise" if problem.per_group == 1 else "groupwise",
        networks={},
        formulation=formulation,
        dtype=problem.dtype,
        batch=batch,
        bytes=None,
    )
