"""Sizes and memory formats against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from refconv_kernels.geometry import is_channels_last, output_format, output_size
from tests.cases import CASES, Case

MAP = torch.empty(2, 3, 4, 5)


@pytest.mark.parametrize("case", [c for c in CASES if not isinstance(c.padding, str)], ids=str)
def test_output_size(case: Case) -> None:
    input, (weight, _, _) = case.input(), case.tensors()
    geometry = case.stride, case.padding, case.dilation
    want = F.conv2d(input, weight, None, *geometry, case.groups).shape[2:]
    assert output_size(input, weight, *geometry) == tuple(want)
    if case.batch:
        assert output_size(input[0], weight, *geometry) == tuple(want)


def test_memory_formats() -> None:
    last = MAP.to(memory_format=torch.channels_last)
    assert is_channels_last(last)
    assert not is_channels_last(MAP)
    assert not is_channels_last(last[0])
    assert not is_channels_last(last[:, :1])  # strided in both
    assert not is_channels_last(torch.empty(2, 1, 4, 5).to(memory_format=torch.channels_last))  # dense in both
    assert output_format(MAP, last) is torch.channels_last
    assert output_format(MAP, MAP) is torch.contiguous_format
