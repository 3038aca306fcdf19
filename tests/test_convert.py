"""``refocus`` and ``reparameterize`` on networks of every origin."""

from __future__ import annotations

import copy
import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from refconv_kernels import RefConv2d, refocus, reparameterize, summary
from refconv_kernels.learning.models import SmallSeparableNet


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Conv2d(8, 16, 1)),
        nn.Conv2d(16, 16, 3, groups=4, stride=2),
    )


def test_replaces_every_kernel_larger_than_one() -> None:
    model = net()
    refocused = refocus(model)
    assert [type(m).__name__ for m in refocused] == ["RefConv2d", "BatchNorm2d", "Sequential", "RefConv2d"]
    assert type(refocused[2][0]) is RefConv2d
    assert type(refocused[2][1]) is nn.Conv2d
    assert not any(isinstance(m, RefConv2d) for m in model.modules())  # a copy by default
    assert refocused[1].weight is not model[1].weight


def test_inplace() -> None:
    model = net()
    pointwise = model[2][1]
    assert refocus(model, inplace=True) is model
    assert isinstance(model[0], RefConv2d)
    assert model[2][1] is pointwise
    assert reparameterize(model, inplace=True) is model
    assert type(model[0]) is nn.Conv2d


def test_zero_initialised_network_is_the_pretrained_one() -> None:
    model, x = net().eval(), torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(refocus(model, init="zeros")(x), model(x))


def test_folding_gives_the_same_function_and_names() -> None:
    model, x = net(), torch.randn(2, 3, 9, 9)
    refocused = refocus(model)
    optimizer = torch.optim.SGD([p for p in refocused.parameters() if p.requires_grad], lr=0.1)
    refocused(x).square().mean().backward()
    optimizer.step()
    refocused.eval()
    folded = reparameterize(refocused)
    assert str(folded) == str(model)
    assert list(folded.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(folded(x), refocused(x))
    fresh = net().eval()
    fresh.load_state_dict(folded.state_dict())
    assert torch.equal(fresh(x), folded(x))
    again = reparameterize(folded)
    assert all(torch.equal(v, folded.state_dict()[k]) for k, v in again.state_dict().items())
    assert isinstance(refocused[0], RefConv2d)  # a copy by default


def test_a_single_convolution() -> None:
    layer = refocus(nn.Conv2d(4, 4, 3))
    assert type(layer) is RefConv2d
    assert type(reparameterize(layer)) is nn.Conv2d


def test_where_selects_and_sees_names() -> None:
    seen = []

    def where(name: str, conv: nn.Conv2d) -> bool:
        seen.append((name, type(conv)))
        return conv.groups == conv.in_channels

    refocused = refocus(net(), where)
    assert [n for n, m in refocused.named_modules() if isinstance(m, RefConv2d)] == ["2.0"]
    assert seen == [("0", nn.Conv2d), ("2.0", nn.Conv2d), ("3", nn.Conv2d)]
    assert summary(refocused).skipped == {"0": "not selected", "2.1": "1x1 kernel", "3": "not selected"}


def test_options_reach_every_layer() -> None:
    refocused = refocus(net(), map_size=1, init="zeros", identity=False, basis="trainable")
    layers = [m for m in refocused.modules() if isinstance(m, RefConv2d)]
    assert len(layers) == 3
    for layer in layers:
        assert layer.transform.map_size == 1
        assert not layer.transform.identity
        assert not layer.weight.any()
        assert layer.basis_weight.requires_grad


def test_transform_is_made_per_convolution() -> None:
    refocused = refocus(net(), transform=lambda conv: nn.Identity())
    transforms = {m.transform for m in refocused.modules() if isinstance(m, RefConv2d)}
    assert len(transforms) == 3
    with pytest.raises(TypeError, match=r"transform \(=Identity\) must be a function from the convolution"):
        refocus(net(), transform=nn.Identity())


def test_convolutions_inside_a_transformation_are_left_alone() -> None:
    class Inner(nn.Module):
        def __init__(self, conv: nn.Conv2d) -> None:
            super().__init__()
            self.mix = nn.Conv2d(conv.weight.shape[1], conv.weight.shape[1], 3, padding=1, bias=False)

        def forward(self, basis: torch.Tensor) -> torch.Tensor:
            return self.mix(basis)

    model = refocus(net(), lambda name, _: name == "0", transform=Inner)
    assert "0.transform.mix" not in summary(model).skipped
    refocus(model, inplace=True)
    assert type(model[0].transform.mix) is nn.Conv2d


def test_shared_modules_stay_shared() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.ModuleDict({"a": conv, "b": conv, "c": nn.Sequential(conv)})
    refocused = refocus(model)
    assert isinstance(refocused["a"], RefConv2d)
    assert refocused["a"] is refocused["b"] is refocused["c"][0]
    folded = reparameterize(refocused)
    assert folded["a"] is folded["b"] is folded["c"][0]
    assert list(folded.state_dict()) == list(model.state_dict())


class Padded(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


def odd_ones() -> nn.ModuleDict:
    tied, partner = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    partner.weight = tied.weight
    zero = nn.Conv2d(4, 4, 3)
    nn.init.zeros_(zero.weight)
    return nn.ModuleDict(
        {
            "ok": nn.Conv2d(4, 4, 3),
            "padded": Padded(4, 4, 3),
            "normed": nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
            "pruned": prune.l1_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.5),
            "tied": tied,
            "partner": partner,
            "zero": zero,
            "narrow": nn.Conv2d(4, 4, (1, 7)),
            "pointwise": nn.Conv2d(4, 4, 1),
            "transposed": nn.ConvTranspose2d(4, 4, 3),
            "one_d": nn.Conv1d(4, 4, 3),
            "three_d": nn.Conv3d(4, 4, 3),
            "lazy": nn.LazyConv2d(4, 3),
            "linear": nn.Linear(4, 4),
        }
    )


REASONS = {
    "padded": "Padded is not exactly nn.Conv2d",
    "normed": "ParametrizedConv2d is not exactly nn.Conv2d",
    "pruned": "its weight is computed (weight norm, pruning)",
    "tied": "its weight or bias is tied to another module",
    "partner": "its weight or bias is tied to another module",
    "zero": "its weight is all zeros",
    "narrow": "kernel 1x7 is smaller than map_size 3",
    "pointwise": "1x1 kernel",
    "transposed": "ConvTranspose2d is not exactly nn.Conv2d",
    "one_d": "Conv1d is not exactly nn.Conv2d",
    "three_d": "Conv3d is not exactly nn.Conv2d",
    "lazy": "LazyConv2d is not exactly nn.Conv2d",
}


def test_what_is_left_alone_is_listed_with_its_reason() -> None:
    model = odd_ones()
    refocused = refocus(model, inplace=True)
    assert [n for n, m in refocused.named_modules() if isinstance(m, RefConv2d)] == ["ok"]
    assert summary(refocused).skipped == REASONS
    assert summary(odd_ones()).skipped == {"ok": "can be refocused", **REASONS}


def test_nothing_to_refocus_raises_unless_told_not_to() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Linear(3, 3))
    with pytest.raises(
        ValueError, match=r"model \(Sequential\) has no convolution to refocus \(0: 1x1 kernel\); pass allow_empty"
    ):
        refocus(model)
    with pytest.raises(ValueError, match=r"\(no convolutions at all\)"):
        refocus(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"\(model: not selected by where\)"):
        refocus(nn.Conv2d(3, 3, 3), lambda *_: False)
    assert str(refocus(model, allow_empty=True)) == str(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"map_size": 2}, ValueError, r"map_size \(=2\) must be a positive odd int"),
        ({"init": "ones"}, ValueError, r"init \(='ones'\)"),
        ({"dtype": torch.float64}, TypeError, r"dtype \(=torch.float64\) follows each convolution"),
        ({"colour": 1}, TypeError, "colour"),
    ],
)
def test_a_bad_option_leaves_the_model_unchanged(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = net()
    before = copy.deepcopy(model)
    with pytest.raises(error, match=message):
        refocus(model, inplace=True, **options)
    assert str(model) == str(before)


@pytest.mark.parametrize("function", [refocus, reparameterize, summary])
def test_not_a_module(function: Any) -> None:
    with pytest.raises(TypeError, match=r"model \(=int\) must be a torch.nn.Module"):
        function(3)


def test_modes_flags_and_layout_return() -> None:
    model = net().to(memory_format=torch.channels_last)
    model.eval()
    model[3].train()
    model[0].weight.requires_grad_(False)
    folded = reparameterize(refocus(model))
    for (name, a), b in zip(model.named_modules(), folded.modules(), strict=True):
        assert a.training == b.training, name
    for (name, a), b in zip(model.named_parameters(), folded.parameters(), strict=True):
        assert (a.requires_grad, a.stride(), a.dtype) == (b.requires_grad, b.stride(), b.dtype), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_low_precision_networks_return_in_their_type(dtype: torch.dtype) -> None:
    folded = reparameterize(refocus(net().to(dtype)))
    assert {p.dtype for p in folded.parameters()} == {dtype}


def test_plain_weights_load_into_a_refocused_network() -> None:
    pretrained, refocused = net(), refocus(net())
    refocused.load_state_dict(pretrained.state_dict())
    assert torch.equal(refocused[2][0].basis_weight, pretrained[2][0].weight)


def test_training_lowers_the_loss_and_leaves_the_basis() -> None:
    model = refocus(SmallSeparableNet())
    basis = {k: v.clone() for k, v in model.state_dict().items() if k.endswith("basis_weight")}
    x, target = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert len(basis) == 4
    assert all(torch.equal(model.state_dict()[k], v) for k, v in basis.items())


# --- networks of other libraries ----------------------------------------------------------------------------


def check_network(model: nn.Module, layers: int) -> None:
    model.eval()
    x = torch.randn(1, 3, 64, 64)
    refocused = refocus(model)
    assert sum(isinstance(m, RefConv2d) for m in refocused.modules()) == layers
    folded = reparameterize(refocused)
    assert str(folded) == str(model)
    assert list(folded.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        want = refocused(x)
        torch.testing.assert_close(folded(x), want, rtol=1e-3, atol=1e-3 * want.abs().max().item())
        torch.testing.assert_close(refocus(model, init="zeros")(x), model(x))


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(("name", "layers"), [("mobilenet_v2", 18), ("resnet18", 17), ("shufflenet_v2_x0_5", 20)])
def test_torchvision(name: str, layers: int) -> None:
    check_network(getattr(importlib.import_module("torchvision.models"), name)(), layers)


@pytest.mark.usefixtures("libraries")
def test_timm_and_its_own_fold() -> None:
    import timm
    from timm.utils.model import reparameterize_model

    model = timm.create_model("mobilenetv3_small_050").eval()
    check_network(model, 12)
    refocused = refocus(model)
    by_timm, ours = reparameterize_model(refocused), reparameterize(refocused)
    assert not any(isinstance(m, RefConv2d) for m in by_timm.modules())
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in by_timm.state_dict().items())


# --- real pretrained weights --------------------------------------------------------------------------------


def minifasnet_like() -> dict[str, torch.Tensor]:
    """Names and shapes as in a real checkpoint of a depthwise network, saved from ``nn.DataParallel``."""
    shapes = {
        "conv1": (32, 3, 3, 3),
        "conv2_dw": (32, 1, 3, 3),
        "conv_23.conv": (103, 32, 1, 1),
        "conv_6_dw": (512, 1, 5, 5),
    }
    return {f"module.{name}.conv.weight": torch.randn(shape) for name, shape in shapes.items()}


def checkpoints() -> list[Any]:
    """The synthetic one, and every ``*.pth`` in the folder that REFCONV_TEST_WEIGHTS names."""
    folder = os.environ.get("REFCONV_TEST_WEIGHTS")
    files = sorted(Path(folder).rglob("*.pth")) if folder else []
    assert files or not folder, f"REFCONV_TEST_WEIGHTS={folder} holds no *.pth"
    return [pytest.param(None, id="synthetic"), *(pytest.param(f, id=f.name) for f in files)]


@pytest.mark.parametrize("file", checkpoints())
def test_a_pretrained_checkpoint_layer_by_layer(file: Path | None) -> None:
    state = minifasnet_like() if file is None else torch.load(file, map_location="cpu", weights_only=True)
    weights = {k: v for k, v in state.items() if v.dim() == 4 and min(v.shape[2:]) >= 3}
    assert weights
    for name, weight in weights.items():
        c_out, per_group, *kernel = weight.shape
        groups = c_out if per_group == 1 else 1
        conv = nn.Conv2d(per_group * groups, c_out, tuple(kernel), groups=groups, bias=False)
        conv.load_state_dict({"weight": weight})
        layer = RefConv2d.from_conv(conv, init="zeros")
        assert torch.equal(layer.basis_weight, weight), name
        assert torch.equal(layer.fuse().weight, weight), name  # the same numbers, bit for bit
        straight = RefConv2d(per_group * groups, c_out, tuple(kernel), groups=groups, bias=False)
        straight.load_state_dict({"weight": weight})
        trained = straight.fuse()
        x = torch.randn(1, per_group * groups, 8, 8)
        torch.testing.assert_close(trained(x), straight(x), rtol=1e-4, atol=1e-4 * straight(x).abs().max().item())
