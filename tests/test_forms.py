"""Changing the form of layers, networks, checkpoints and optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from refconv_kernels import RefConv2d, full_to_thin, refocus, reparameterize, thin_to_full

CHANGES = {"full": full_to_thin, "thin": thin_to_full}
OTHER = {"full": "thin", "thin": "full"}


def network(form: str, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 3, groups=8),
        nn.Conv2d(16, 16, (3, 5), groups=4, padding=1),
        nn.Conv2d(16, 4, 1),
    )
    return refocus(plain.double(), form=form, **options)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: m.weight.detach() for name, m in model.named_modules() if isinstance(m, RefConv2d)}


def forms(model: nn.Module) -> list[str | None]:
    return [m.form for m in model.modules() if isinstance(m, RefConv2d)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        x = torch.randn(2, 3, 9, 9, dtype=torch.float64, generator=generator)
        model(x).square().mean().backward()
        optimizer.step()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def assert_same_weights(a: nn.Module, b: nn.Module, tolerance: float = 1e-12) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("form", CHANGES)
def test_a_network_in_the_other_form(form: str) -> None:
    model = network(form).eval()
    model[2].transform.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = CHANGES[form](model)
    assert forms(other) == ["full", OTHER[form], OTHER[form]]  # the dense layer's forms are one
    assert_same_weights(other, model)
    assert not other[2].transform.training
    assert not other[2].transform.weight.requires_grad
    assert other[3].transform.init == "xavier"
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert_same_weights(CHANGES[OTHER[form]](other), model)
    assert forms(CHANGES[form](other)) == forms(other)  # changing again changes nothing
    folded, want = reparameterize(other), reparameterize(model)
    for name, tensor in want.state_dict().items():
        torch.testing.assert_close(folded.state_dict()[name], tensor, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", CHANGES)
def test_a_single_layer_in_place(form: str) -> None:
    layer = RefConv2d(8, 8, 3, groups=8, form=form, identity=False)
    want = layer.weight.detach()
    assert CHANGES[form](layer, inplace=True) is layer
    assert (layer.form, layer.transform.identity) == (OTHER[form], False)
    torch.testing.assert_close(layer.weight.detach(), want)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.ASGD])
@pytest.mark.parametrize("form", CHANGES)
def test_a_run_changes_its_form_in_the_middle(form: str, kind: Callable[..., torch.optim.Optimizer]) -> None:
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 1e-2}
    options |= {"momentum": 0.9, "nesterov": True} if kind is torch.optim.SGD else {"t0": 5}
    model = network(form)
    optimizer = kind([{"params": trained(model)[:3]}, {"params": trained(model)[3:], "lr": 0.01}], **options)
    train(model, optimizer, 20, seed=0)
    straight = copy.deepcopy((model, optimizer))
    model(torch.ones(2, 3, 9, 9, dtype=torch.float64)).sum().backward()  # in the middle of an accumulation
    gradient_norm = nn.utils.clip_grad_norm_(trained(model), float("inf"))
    CHANGES[form](model, optimizer, inplace=True)
    torch.testing.assert_close(nn.utils.clip_grad_norm_(trained(model), float("inf")), gradient_norm)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, trained(model)))
    assert set(map(id, optimizer.state)) <= set(map(id, trained(model)))
    train(model, optimizer, 20, seed=1)
    train(*straight, 20, seed=1)
    assert_same_weights(model, straight[0])


@pytest.mark.parametrize("form", CHANGES)
def test_checkpoints(form: str) -> None:
    model, other = network(form), network(OTHER[form], init="zeros")
    state = model.state_dict()
    with pytest.raises(
        RuntimeError, match=rf"a checkpoint of the other form: convert it with {CHANGES[form].__name__}"
    ):
        other.load_state_dict(state)
    converted = CHANGES[form](state)
    assert other.load_state_dict(converted) == ([], [])
    assert_same_weights(other, model)
    assert converted._metadata == state._metadata
    assert list(CHANGES[OTHER[form]](converted)) == list(state)
    assert CHANGES[form](reparameterize(model).state_dict()).keys() == reparameterize(model).state_dict().keys()


@pytest.mark.parametrize("map_size", [1, 3, 5])
def test_map_size_of_a_checkpoint_is_recognised(map_size: int) -> None:
    layer = RefConv2d(32, 32, 5, groups=32, map_size=map_size, form="thin")
    full = RefConv2d(32, 32, 5, groups=32, map_size=map_size)
    assert layer.form == "thin"
    full.load_state_dict(thin_to_full(layer.state_dict()))
    torch.testing.assert_close(full.weight, layer.weight)


def test_checkpoint_of_the_authors_module() -> None:
    full = RefConv2d(8, 8, 3, groups=8)
    theirs = {"weight": full.basis_weight, "convmap.weight": full.transform.weight, "bias": full.bias}
    prefixed = {f"stage.0.{name}": tensor.detach() for name, tensor in theirs.items()}
    layer = RefConv2d(8, 8, 3, groups=8, form="thin")
    nn.ModuleDict({"stage": nn.Sequential(layer)}).load_state_dict(full_to_thin(prefixed))
    torch.testing.assert_close(layer.weight, full.weight)


def test_errors_change_nothing() -> None:
    model = network("full")
    adam = torch.optim.Adam(trained(model))
    with pytest.raises(ValueError, match=r"optimizer needs inplace=True"):
        full_to_thin(model, adam)
    with pytest.raises(ValueError, match=r"optimizer \(=Adam\) must be SGD or ASGD"):
        full_to_thin(model, adam, inplace=True)
    with pytest.raises(TypeError, match=r"optimizer \(=int\) must be a torch.optim.Optimizer"):
        full_to_thin(model, 3, inplace=True)
    with pytest.raises(TypeError, match=r"source \(=list\) must be a torch.nn.Module or a state_dict"):
        full_to_thin([model])
    with pytest.raises(ValueError, match=r"inplace \(=True\) needs a module"):
        full_to_thin(model.state_dict(), inplace=True)
    model[3].basis_weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"layer '3' has a trainable basis: its thin form would be another model"):
        full_to_thin(model, inplace=True)
    assert forms(model) == ["full"] * 3
    thin = network("thin")
    thin[3].basis_weight.data[0] += 1
    with pytest.raises(ValueError, match=r"layer '3': transform.factor is not the factor of basis_weight"):
        thin_to_full(thin, inplace=True)
    with pytest.raises(ValueError, match=r"3.transform.factor is not the factor of 3.basis_weight"):
        thin_to_full(thin.state_dict())
    thin[3].basis_weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"layer '3' has a trainable basis: its full form"):
        thin_to_full(thin, inplace=True)
    assert forms(thin) == ["full", "thin", "thin"]
