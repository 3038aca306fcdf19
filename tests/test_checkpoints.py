"""``RefConv2d``: state, loading, copies."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refconv_kernels import RefConv2d


def test_state_dict_names() -> None:
    assert list(RefConv2d(4, 4, 3).state_dict()) == ["basis_weight", "bias", "transform.weight"]
    assert list(RefConv2d(4, 4, 3, bias=False).state_dict()) == ["basis_weight", "transform.weight"]


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign: bool) -> None:
    one, two = RefConv2d(4, 4, 3, groups=4), RefConv2d(4, 4, 3, groups=4)
    two.load_state_dict(one.state_dict(), assign=assign)
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(one(x), two(x))
    assert not two.basis_weight.requires_grad
    assert two.transform.weight.requires_grad


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_convolution_loads_straight_in(assign: bool) -> None:
    conv, layer = nn.Conv2d(4, 4, 3, groups=4), RefConv2d(4, 4, 3, groups=4)
    refocus = layer.transform.weight
    before = refocus.detach().clone()
    layer.load_state_dict(conv.state_dict(), assign=assign)
    assert torch.equal(layer.basis_weight, conv.weight)
    assert torch.equal(layer.bias, conv.bias)
    assert layer.transform.weight is refocus
    assert torch.equal(refocus, before)

    net = nn.Sequential(nn.Sequential(RefConv2d(4, 4, 3, groups=4)), nn.ReLU())  # and inside a network
    net.load_state_dict(nn.Sequential(nn.Sequential(conv), nn.ReLU()).state_dict(), assign=assign)
    assert torch.equal(net[0][0].basis_weight, conv.weight)


def test_a_checkpoint_of_the_authors_module_loads() -> None:
    layer = RefConv2d(4, 8, 3, groups=2, bias=False)
    checkpoint = {"weight": torch.randn(8, 2, 3, 3), "convmap.weight": torch.randn(16, 2, 3, 3)}
    layer.load_state_dict(checkpoint)
    assert torch.equal(layer.basis_weight, checkpoint["weight"])
    assert torch.equal(layer.transform.weight, checkpoint["convmap.weight"])
    net = nn.Sequential(RefConv2d(4, 8, 3, groups=2, bias=False))
    net.load_state_dict({f"0.{k}": v for k, v in checkpoint.items()})
    assert torch.equal(net[0].weight, layer.weight)


GOOD = {"basis_weight": torch.randn(4, 1, 3, 3), "bias": torch.randn(4), "transform.weight": torch.randn(4, 4, 3, 3)}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"basis_weight": None}, r'Missing key\(s\) in state_dict: "basis_weight"'),
        ({"bias": None}, r'Missing key\(s\) in state_dict: "bias"'),
        ({"extra": torch.zeros(1)}, r'Unexpected key\(s\) in state_dict: "extra"'),
        ({"weight": torch.randn(4, 1, 3, 3)}, r'Unexpected key\(s\) in state_dict: "weight"'),
        ({"transform.scale": torch.zeros(1)}, r'Unexpected key\(s\) in state_dict: "transform.scale"'),
        ({"basis_weight": torch.zeros(4, 1, 3, 3)}, r"basis_weight is all zeros: a frozen zero basis stays zero"),
        (
            {"basis_weight": torch.randn(4, 1, 5, 5)},
            r"size mismatch for basis_weight: \(4, 1, 5, 5\) must be \(4, 1, 3, 3\)",
        ),
        ({"transform.weight": torch.randn(4, 4, 1, 1)}, r"size mismatch for transform.weight: \(4, 4, 1, 1\) must be"),
        ({"bias": torch.randn(5)}, r"size mismatch for bias: \(5,\) must be \(4,\)"),
        ({"bias": "three"}, r'parameter named "bias", expected torch.Tensor'),
    ],
)
def test_a_failed_load_leaves_the_layer_as_it_was(changes: dict[str, Any], message: str, assign: bool) -> None:
    layer = RefConv2d(4, 4, 3, groups=4)
    parameters = dict(layer.named_parameters())
    before = {k: v.detach().clone() for k, v in parameters.items()}
    state = {k: v for k, v in {**GOOD, **changes}.items() if v is not None}
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state, assign=assign)
    after = dict(layer.named_parameters())
    assert all(after[k] is parameters[k] and torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize(
    "changes", [{"basis_weight": torch.zeros(4, 1, 3, 3)}, {"transform.weight": torch.randn(4, 4, 1, 1)}]
)
def test_a_failed_load_of_a_network_leaves_the_layer_as_it_was(changes: dict[str, Tensor]) -> None:
    net = nn.Sequential(RefConv2d(4, 4, 3, groups=4))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(RuntimeError, match="0.basis_weight is all zeros|size mismatch for 0.transform.weight"):
        net.load_state_dict({f"0.{k}": v for k, v in {**GOOD, **changes}.items()})
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_loading_not_strictly_reports_what_is_missing() -> None:
    layer = RefConv2d(4, 4, 3, groups=4)
    result = layer.load_state_dict({"bias": GOOD["bias"], "other": torch.zeros(1)}, strict=False)
    assert result.missing_keys == ["basis_weight"]
    assert result.unexpected_keys == ["other"]
    assert torch.equal(layer.bias, GOOD["bias"])


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same_and_share_nothing(how: str) -> None:
    layer = RefConv2d(4, 4, 3, groups=4).eval()
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        want = layer(x)  # so that a kept W_t is there to be copied
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        assert torch.equal(other(x), want)
        other.transform.weight.zero_()
        assert torch.equal(layer(x), want)
        assert not torch.equal(other(x), want)
    assert other.basis_weight.requires_grad == layer.basis_weight.requires_grad


def test_to_moves_everything() -> None:
    layer = RefConv2d(4, 4, 3, groups=4).eval()
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        single = layer(x)
        double = layer.to(torch.float64)(x.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single)
    layer = RefConv2d(4, 6, 3).to(memory_format=torch.channels_last)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
