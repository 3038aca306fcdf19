"""Counting: the paper's Table I, and the printed table."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from refconv_kernels import RefConv2d, refocus, reparameterize, summary, variant
from refconv_kernels.learning.models import MobileNetV1, MobileNetV2


@pytest.mark.parametrize(
    ("network", "increase"),
    [(MobileNetV1, 25.07), (MobileNetV2, 40.55)],  # Table I: 28.29 - 3.22 and 44.11 - 3.56 million
)
def test_table_1(network: type[nn.Module], increase: float) -> None:
    model = network()
    before, after = summary(model), summary(refocus(model))
    assert round((after.training_parameters - before.training_parameters) / 1e6, 2) == increase
    assert before.training_parameters == before.deployed_parameters == after.deployed_parameters


def test_parameters_of_mobilenets_are_the_published_ones() -> None:
    assert summary(MobileNetV1()).deployed_parameters == 4_231_976
    assert summary(MobileNetV2()).deployed_parameters == 3_504_872
    assert summary(MobileNetV1(10)).deployed_parameters == 3_217_226  # Table I counts 3.22 million: ten classes


def test_counts_of_one_layer() -> None:
    layer = refocus(nn.Conv2d(8, 8, 5, groups=8), map_size=3)
    result = summary(layer, (2, 8, 10, 10))
    (row,) = result.layers
    assert (row.name, row.case, row.basis_shape, row.basis_trainable) == ("", "depthwise", (8, 1, 5, 5), False)
    assert row.transform_parameters == 9 * 8 * 8
    assert row.transform_flops == result.transform_flops == 25 * 9 * 8 * 8  # K^2 k^2 C_in C_out
    assert result.training_parameters == 9 * 8 * 8 + 8
    assert result.frozen_parameters == 25 * 8
    assert result.deployed_parameters == 25 * 8 + 8
    assert result.training_bytes == 4 * (9 * 8 * 8 + 25 * 8 + 8)
    assert result.deployed_bytes == 4 * (25 * 8 + 8)
    assert result.deployed_flops == 25 * 8 * 6 * 6 * 2


def test_counting_leaves_the_model_as_it_was() -> None:
    model = refocus(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    summary(model, (2, 3, 8, 8))
    assert model.training
    assert isinstance(model[0], RefConv2d)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_cases_and_shared_layers() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    model = refocus(nn.ModuleList([nn.Conv2d(4, 8, 3, groups=2), shared, shared]), basis="trainable")
    result = summary(model)
    assert [layer.case for layer in result.layers] == ["groupwise", "dense"]  # the shared one once
    assert result.training_parameters == sum(p.numel() for p in model.parameters())
    assert summary(reparameterize(model)).deployed_parameters == result.deployed_parameters


def test_custom_transform_has_unknown_arithmetic() -> None:
    result = summary(refocus(nn.Conv2d(3, 3, 3), transform=lambda conv: nn.Identity()))
    assert result.transform_flops is None
    (row,) = result.layers
    assert (row.form, row.transform) == (None, "Identity")
    assert re.search(r"frozen  Identity +0 +\?", str(result))


def test_arithmetic_of_the_variants() -> None:
    """Table VII: a branch or a layer more costs the first one's again; attention a product each way."""
    conv = nn.Conv2d(8, 8, 3, groups=8)
    once = 9 * 9 * 8 * 8
    for name, times, attention in (("1B1L", 1, 0), ("2B1L", 2, 0), ("3B1L", 3, 0), ("1B2L", 2, 0), ("1B2L+SE", 2, 32)):
        result = summary(refocus(conv, transform=lambda conv, name=name: variant(name, conv)))
        assert result.transform_flops == times * once + attention
    assert "StackedRefocusing" in str(result)


def test_printed_table() -> None:
    text = str(summary(refocus(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))), (1, 8, 5, 5)))
    assert text.splitlines()[0].split() == [
        "layer",
        "case",
        "basis",
        "weights",
        "basis",
        "form",
        "trained",
        "multiply-adds",
    ]
    assert "0      depthwise  8x1x3x3        frozen  full  576      5,184" in text
    assert "left alone: 1\n  1: 1x1 kernel" in text
    assert "multiply-adds per step" in text
    assert "deployed network" in text
    assert "no refocused layers" in str(summary(nn.Linear(3, 3)))
