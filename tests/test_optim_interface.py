"""``FoldedAdamW`` as an optimizer: its state, groups, closures and errors."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refconv_kernels import FoldedAdamW, RefConv2d, guard, refocus, use_backend
from tests.test_optim import batches, network, train

# --- state ---------------------------------------------------------------------------------------------------


def test_state_elements() -> None:
    layer = refocus(nn.Conv2d(32, 32, 3, groups=32), form="thin")
    optimizer = FoldedAdamW(layer.parameters(), layer)
    layer(torch.randn(1, 32, 5, 5)).sum().backward()
    optimizer.step()
    state = optimizer.state[layer.transform.weight]
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "step": (),
        "exp_avg": (32, 9),
        "exp_avg_sq_root": (32, 45),
    }
    assert set(optimizer.state[layer.bias]) == {"step", "exp_avg", "exp_avg_sq"}
    assert layer.basis_weight not in optimizer.state


def _save_and_load(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_resuming_gives_the_same_bits(dtype: torch.dtype) -> None:
    def start(seed: int) -> tuple[nn.Module, FoldedAdamW]:
        torch.manual_seed(seed)
        model = refocus(network(dtype), form="thin")
        return model, FoldedAdamW(model.parameters(), model, lr=1e-2)

    model, optimizer = start(1)
    data = batches(model, 3, 13, count=1)
    train(model, optimizer, data, 5)
    saved = _save_and_load({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed, resumed_optimizer = start(2)
    train(resumed, resumed_optimizer, data, 1)  # so that Q of another basis is there to be forgotten
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    for trained, steps in ((model, optimizer), (resumed, resumed_optimizer)):
        train(trained, steps, data, 5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    theirs = resumed_optimizer.state_dict()["state"]
    for key, state in optimizer.state_dict()["state"].items():
        assert all(
            torch.equal(t, theirs[key][name]) and t.dtype == theirs[key][name].dtype for name, t in state.items()
        )


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_train_on_alike(how: str) -> None:
    model, data = refocus(network(), form="thin"), None
    optimizer = FoldedAdamW(model.parameters(), model, lr=1e-2)
    data = batches(model, 3, 13)
    train(model, optimizer, data, 3)
    both = model, optimizer
    other, other_optimizer = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    train(model, optimizer, data, 3)
    before = model.state_dict()
    train(other, other_optimizer, data, 3)
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in before.items())
    other_optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_a_new_basis_gives_new_rotations() -> None:
    layer = refocus(nn.Conv2d(4, 4, 3, groups=4), form="thin")
    optimizer = FoldedAdamW([layer.transform.weight], layer)
    first = optimizer._rotation(layer.transform.weight)
    assert optimizer._rotation(layer.transform.weight) is first
    with torch.no_grad():
        layer.basis_weight.copy_(torch.randn(4, 1, 3, 3))
    layer.transform.weight.grad = torch.ones_like(layer.transform.weight)
    with pytest.raises(RuntimeError, match=r"transform.factor is not that of basis_weight: call transform.rebase"):
        optimizer.step()
    layer.transform.rebase(layer.basis_weight)
    optimizer.step()
    assert not torch.equal(optimizer._rotation(layer.transform.weight), first)


# --- the interface -------------------------------------------------------------------------------------------


def test_groups_names_closures_and_missing_gradients() -> None:
    model = refocus(network(), form="thin")
    thin = [
        layer.transform.weight for layer in model.modules() if isinstance(layer, RefConv2d) and layer.form == "thin"
    ]
    optimizer = FoldedAdamW(list(model[-1].named_parameters()), model)
    optimizer.add_param_group({"params": [("a", thin[0])], "lr": 0.0})
    optimizer.add_param_group({"params": [("b", thin[1])], "lr": 0.1})
    before = [p.detach().clone() for p in (*thin, model[0].transform.weight, model[-1].weight)]
    x = torch.randn(2, 3, 13, 13, dtype=torch.float64)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    changed = [
        not torch.equal(p, b) for p, b in zip((*thin, model[0].transform.weight, model[-1].weight), before, strict=True)
    ]
    assert changed == [False, True, False, True]  # the third is in no group
    optimizer.zero_grad()
    after = model.state_dict()
    optimizer.step()
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in after.items())


def test_autocast_leaves_the_step_alone() -> None:
    layer = refocus(nn.Conv2d(4, 4, 3, groups=4), form="thin")
    results = []
    for enabled in (False, True):
        one = copy.deepcopy(layer)
        one.transform.weight.grad = torch.linspace(-1, 1, 36).reshape(4, 9)
        with use_backend("reference"), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            FoldedAdamW(one.parameters(), one).step()
        results.append(one.transform.weight.detach())
    assert torch.equal(*results)


def test_the_guard_knows_it() -> None:
    layer = refocus(nn.Conv2d(4, 4, 3, groups=4), form="thin")
    layer(torch.randn(1, 4, 5, 5)).sum().backward()
    assert FoldedAdamW in guard.EXACT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FoldedAdamW(layer.parameters(), layer).step()
    with pytest.warns(UserWarning, match=r"AdamW trains .* and in place of AdamW refconv_kernels.FoldedAdamW"):
        torch.optim.AdamW(layer.parameters()).step()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": None}, TypeError, r"model \(=None\) must be the torch.nn.Module whose parameters are trained"),
        ({"lr": -1.0}, ValueError, r"lr \(=-1.0\) must be a number of at least 0"),
        ({"lr": "1"}, ValueError, r"lr \(='1'\) must be a number of at least 0"),
        ({"eps": -1e-8}, ValueError, r"eps \(=-1e-08\) must be a number of at least 0"),
        ({"weight_decay": float("nan")}, ValueError, r"weight_decay \(=nan\) must be a number of at least 0"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas \(=\(0.9, 1.0\)\) must be two numbers in \[0, 1\)"),
        ({"betas": 0.9}, ValueError, r"betas \(=0.9\) must be two numbers in \[0, 1\)"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(error, match=message):
        FoldedAdamW(model.parameters(), **{"model": model, **options})


def test_what_cannot_be_folded_raises() -> None:
    model = refocus(network(), form="thin")
    optimizer = FoldedAdamW(model[0].parameters(), model)
    with pytest.raises(ValueError, match=r"amsgrad \(=True\) must be left out"):
        optimizer.add_param_group({"params": model[1].parameters(), "amsgrad": True})
    with pytest.raises(
        ValueError, match=r"the weight \(8, 9\) of a layer of form='thin' that is not in model \(=Linear\)"
    ):
        FoldedAdamW(model.parameters(), model[-1])
    model[3].basis_weight.requires_grad_()
    with pytest.raises(ValueError, match=r"basis_weight \(8, 1, 3, 3\) .* requires_grad \(=True\) must be False"):
        optimizer.add_param_group({"params": [model[3].transform.weight]})
    assert len(optimizer.param_groups) == 1
    model[3].basis_weight.requires_grad_(False)
    optimizer.add_param_group({"params": [model[3].transform.weight]})
    model[3].basis_weight.requires_grad_()
    model[3].transform.weight.grad = torch.ones(8, 9, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"requires_grad \(=True\) must be False"):
        optimizer.step()
    embedding = nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"FoldedAdamW does not support sparse gradients"):
        FoldedAdamW(embedding.parameters(), embedding).step()


def test_a_state_that_does_not_fit_raises_and_changes_nothing() -> None:
    model = refocus(nn.Conv2d(4, 4, 3, groups=4), form="thin")
    optimizer = FoldedAdamW(model.parameters(), model)
    model(torch.randn(1, 4, 5, 5)).sum().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    other = copy.deepcopy(state)
    key = next(key for key, value in other["state"].items() if "exp_avg_sq_root" in value)
    other["state"][key]["exp_avg_sq"] = other["state"][key].pop("exp_avg_sq_root")  # AdamW's
    message = rf"exp_avg_sq_root of parameter {key} \(shape None\) must have shape \(4, 45\)"
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(other)
    now = optimizer.state_dict()["state"]
    assert all(torch.equal(t, now[k][name]) for k, value in state["state"].items() for name, t in value.items())
