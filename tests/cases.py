"""Convolution problems shared by the tests: the specification's cases, and a strategy that draws others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from refconv_kernels.functional import refocus_factor

UNIT = ((1, 1), (1, 1), (1, 1))  # a geometry for rules: stride, padding, dilation


@dataclass(frozen=True)
class Case:
    """``nn.Conv2d``'s arguments and an input size."""

    name: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    groups: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding_mode: str = "zeros"
    bias: bool = True
    map_size: int = 3
    batch: int = 2
    height: int = 7
    width: int = 9

    def __str__(self) -> str:
        return self.name

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``nn.Conv2d``."""
        names = ("stride", "padding", "dilation", "groups", "padding_mode", "bias")
        return {name: getattr(self, name) for name in names}

    @property
    def args(self) -> tuple[int, int, tuple[int, int]]:
        return self.in_channels, self.out_channels, self.kernel_size

    @property
    def reduction(self) -> int:
        """Terms of the longest sum: over a window, a refocus group, or a feature map."""
        window = self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]
        return max(window, self.groups * self.map_size**2, self.batch * self.height * self.width)

    def input(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
        return torch.randn(self.batch, self.in_channels, self.height, self.width, dtype=dtype, device=device)

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | None]:
        """Basis, refocusing weights, bias."""
        basis = torch.randn(self.out_channels, self.in_channels // self.groups, *self.kernel_size, dtype=dtype)
        kernels = basis.shape[0] * basis.shape[1]
        refocus = torch.randn(kernels, self.groups, self.map_size, self.map_size, dtype=dtype)
        return basis, refocus, torch.randn(self.out_channels, dtype=dtype) if self.bias else None

    def thin_tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Basis, coordinates, factor, bias."""
        basis, _, bias = self.tensors(dtype)
        factor = refocus_factor(basis, self.groups, self.map_size)
        return basis, torch.randn(basis.shape[0] * basis.shape[1], factor.shape[1], dtype=dtype), factor, bias


DEPTHWISE = [
    Case("depthwise", 6, 6, (3, 3), 6),
    Case("depthwise_multiplier", 4, 8, (3, 3), 4),
    Case("depthwise_stride", 5, 5, (3, 3), 5, stride=(2, 2), height=8, width=8),
    Case("depthwise_asymmetric", 5, 5, (3, 5), 5, stride=(2, 1), padding=(1, 0), dilation=(2, 1), height=11),
    Case("depthwise_5x5", 4, 4, (5, 5), 4, padding=(2, 2)),
    Case("depthwise_7x7_map_5", 3, 3, (7, 7), 3, padding=(3, 3), map_size=5, height=14, width=14),
    Case("depthwise_even_kernel", 4, 4, (4, 4), 4, map_size=3),
    Case("depthwise_same", 4, 4, (4, 3), 4, padding="same", dilation=(1, 2)),
    Case("depthwise_valid_no_bias", 17, 17, (3, 3), 17, padding="valid", bias=False, height=5, width=19),
    Case("depthwise_map_1", 4, 4, (1, 3), 4, padding=(0, 1), map_size=1),
    Case("depthwise_reflect", 4, 4, (3, 3), 4, padding_mode="reflect"),
    Case("depthwise_empty_batch", 4, 4, (3, 3), 4, batch=0),
    Case("depthwise_one_pixel", 4, 4, (3, 3), 4, height=1, width=1),
]
OTHERS = [
    Case("groupwise", 8, 12, (3, 3), 4),
    Case("groupwise_wide", 16, 16, (3, 3), 8, stride=(2, 2)),
    Case("groupwise_circular", 4, 6, (3, 3), 2, padding_mode="circular", padding=(2, 1)),
    Case("dense", 3, 5, (3, 3), 1),
    Case("dense_rectangular", 4, 3, (3, 5), 1, padding=(0, 2), dilation=(2, 1), height=9),
    Case("dense_replicate_no_bias", 2, 3, (5, 5), 1, padding=(2, 2), padding_mode="replicate", bias=False),
    Case("dense_same_even", 3, 4, (4, 4), 1, padding="same"),
    Case("dense_empty_batch", 3, 4, (3, 3), 1, batch=0),
]
CASES = DEPTHWISE + OTHERS
SMALL = [  # for checks that are quadratic in the size
    replace(case, batch=min(case.batch, 1), height=min(case.height, 5), width=min(case.width, 6))
    for case in CASES
    if case.name
    in ("depthwise", "depthwise_multiplier", "depthwise_stride", "depthwise_same", "groupwise", "dense_rectangular")
]
SMALL = [replace(case, height=9) if case.name == "dense_rectangular" else case for case in SMALL]


@st.composite
def cases(draw: st.DrawFn, wide: bool = False) -> Case:
    """Any small valid problem; widths and, when `wide`, channels straddle the vector widths of the CPU kernels."""
    groups = draw(st.integers(1, 20 if wide else 6))
    per_group = draw(st.sampled_from([1, 1, 1, 2, 3]) if wide else st.integers(1, 3))
    kernel = (draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    padding = (draw(st.integers(0, 4)), draw(st.integers(0, 4)))
    smallest = [max(1, dilation[d] * (kernel[d] - 1) + 1 - 2 * padding[d]) for d in (0, 1)]
    return Case(
        "drawn",
        groups * per_group,
        groups * draw(st.integers(1, 3)),
        kernel,
        groups,
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        padding=padding,
        dilation=dilation,
        bias=draw(st.booleans()),
        map_size=draw(st.sampled_from([k for k in (1, 3, 5, 7) if k <= min(kernel)])),
        batch=draw(st.integers(0, 3)),
        height=smallest[0] + draw(st.integers(0, 5)),
        width=smallest[1] + draw(st.integers(0, 34)),
    )
