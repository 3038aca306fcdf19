"""``FoldedAdamW`` on the thin form against ``torch.optim.AdamW`` on the full form."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refconv_kernels import FoldedAdamW, RefConv2d, guard, refocus, use_backend

STEPS = 200

#: ``nn.Conv2d``'s arguments, and options of the layer.
CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]] = {
    "depthwise": ((6, 6, 3), {"groups": 6}, {}),
    "multiplier": ((4, 8, 3), {"groups": 4, "bias": False}, {}),
    "groupwise": ((8, 12, 3), {"groups": 4}, {}),
    "rectangular": ((5, 5, (3, 5)), {"groups": 5, "padding": (1, 0)}, {}),
    "map_5": ((3, 3, 7), {"groups": 3, "padding": 3}, {"map_size": 5}),
    "no_identity": ((6, 6, 3), {"groups": 6}, {"identity": False}),
    "stride": ((6, 6, 3), {"groups": 6, "stride": 2, "padding": 1}, {"init": "kaiming"}),
    "rank_deficient": ((6, 6, 3), {"groups": 6}, {}),
}


def convolution(name: str, dtype: torch.dtype = torch.float64) -> nn.Conv2d:
    args, geometry, _ = CASES[name]
    conv = nn.Conv2d(*args, **geometry, dtype=dtype)
    if name == "rank_deficient":  # all kernels vanish outside two pixels, and one channel does altogether
        with torch.no_grad():
            conv.weight.mul_(torch.tensor([[0, 0, 0], [0, 1, 1], [0, 0, 0]]))
            conv.weight[2] = 0
    return conv


def forms(module: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The full and the thin form of one network, with the same ``W_t``."""
    both = []
    for form in ("full", "thin"):
        torch.manual_seed(5)
        both.append(refocus(module, form=form, **options))
    return both[0], both[1]


def optimizers(full: nn.Module, thin: nn.Module, **options: Any) -> tuple[torch.optim.AdamW, FoldedAdamW]:
    return torch.optim.AdamW(full.parameters(), **options), FoldedAdamW(thin.parameters(), thin, **options)


def batches(model: nn.Module, channels: int, size: int = 9, count: int = 7) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets; no target can be reached, so gradients stay large and change from step to step."""
    dtype = next(model.parameters()).dtype
    model = copy.deepcopy(model)  # whose BatchNorms count
    inputs = [torch.randn(2, channels, size, size + 2, dtype=dtype) for _ in range(count)]
    with torch.no_grad():
        return [(x, torch.randn_like(model(x))) for x in inputs]


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Sequence[tuple[Tensor, Tensor]],
    steps: int,
    clip: float | None = None,
    schedule: Any = None,
) -> None:
    for step in range(steps):
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()


def require_same(full: nn.Module, thin: nn.Module, bound: float = 1e-9) -> None:
    """All weights of convolutions that are used, and all other parameters and buffers."""
    kept = [module for module in full.modules() if isinstance(module, RefConv2d)]
    for layer, other in zip(kept, (m for m in thin.modules() if isinstance(m, RefConv2d)), strict=True):
        assert (layer.weight - other.weight).abs().max() <= bound
        assert (layer.weight - layer.basis_weight).abs().max() > 1e-3
    ours = thin.state_dict()
    for name, tensor in full.state_dict().items():
        if "transform" not in name:
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=bound)


# --- the same training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_full_forms_training(name: str, backend: str) -> None:
    full, thin = forms(convolution(name), **CASES[name][2])
    assert (full.form, thin.form) == ("full", "thin")
    data = batches(full, full.in_channels)
    with use_backend("reference"):
        initial = full.weight
        torch.testing.assert_close(thin.weight, initial, rtol=0, atol=1e-12)
        ours, theirs = optimizers(full, thin, lr=1e-2, weight_decay=0.1)
        train(full, ours, data, STEPS)
        train(thin, _with_backend(theirs, backend), data, STEPS)
        require_same(full, thin)
        assert (full.weight - initial).abs().max() > 0.05


def _with_backend(optimizer: FoldedAdamW, backend: str) -> FoldedAdamW:
    """Its steps on ``backend``, whatever the rest runs on."""
    step = optimizer.step

    def on_backend(closure: Callable[[], Any] | None = None) -> Any:
        with use_backend(backend):
            return step(closure)

    optimizer.step = on_backend  # type: ignore[method-assign]
    return optimizer


@pytest.mark.parametrize(
    ("options", "clip", "scheduled"),
    [
        ({"lr": 3e-3, "weight_decay": 0.0, "betas": (0.5, 0.9)}, None, False),
        ({"lr": 1e-2, "weight_decay": 0.1}, 0.05, False),
        ({"lr": 1e-2}, None, True),
        ({"lr": 1e-3, "eps": 1e-3, "maximize": True}, 1.0, True),
    ],
    ids=["betas", "clipping", "schedule", "maximize"],
)
def test_options_clipping_and_schedules(options: dict[str, Any], clip: float | None, scheduled: bool) -> None:
    full, thin = forms(convolution("depthwise"))
    data = batches(full, 6)
    for model, optimizer in zip((full, thin), optimizers(full, thin, **options), strict=True):
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, STEPS + 1) if scheduled else None
        train(model, optimizer, data, STEPS, clip, schedule)
    require_same(full, thin)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    layers = [
        nn.Conv2d(3, 8, 3, stride=2),  # groups * 9 <= 9: one form
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Conv2d(8, 12, 1),
        nn.Conv2d(12, 12, 3, padding=1, groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    ]
    return nn.Sequential(*layers).to(dtype)


def test_a_whole_network() -> None:
    full, thin = forms(network())
    assert [m.form for m in thin.modules() if isinstance(m, RefConv2d)] == ["full", "thin", "thin"]
    data = batches(full, 3, 13)
    for model, optimizer in zip((full, thin), optimizers(full, thin, lr=3e-3, weight_decay=0.1), strict=True):
        train(model, optimizer, data, STEPS)
    require_same(full, thin, 1e-8)


def test_others_are_bit_for_bit_adamws() -> None:
    """Parameters that are not of thin layers, complex ones and a learning rate as a tensor among them."""
    initial = [torch.randn(3, 4), torch.randn(5, dtype=torch.cfloat), torch.randn(2, dtype=torch.float64)]
    for lr in (1e-2, torch.tensor(1e-2)):
        states = []
        for build in (torch.optim.AdamW, lambda p, **o: FoldedAdamW(p, nn.Identity(), **o)):
            params = [nn.Parameter(t.clone()) for t in initial]
            optimizer = build(params, lr=lr, weight_decay=0.1)
            for step in range(5):
                for p in params:
                    p.grad = (step + 1) * p.detach() ** 2
                optimizer.step()
            states.append((params, [optimizer.state_dict()["state"][n] for n in range(3)]))
        assert all(torch.equal(a, b) for a, b in zip(states[0][0], states[1][0], strict=True))
        for a, b in zip(states[0][1], states[1][1], strict=True):
            assert list(a) == list(b) == ["step", "exp_avg", "exp_avg_sq"]
            assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["depthwise", "groupwise", "map_5"])
def test_float32_is_as_accurate_as_the_full_form(name: str, backend: str) -> None:
    """Given gradients, so that only the optimizers' own errors count."""
    exact, _ = forms(convolution(name), **CASES[name][2])
    single, thin = forms(convolution(name, torch.float32), **CASES[name][2])
    layers = (exact, single, thin)
    with torch.no_grad():
        exact.float().double()  # numbers that all of them hold
        for model in layers:
            model.load_state_dict({name: t for name, t in exact.state_dict().items() if "transform" not in name})
            model.transform.weight.zero_()
    updates = [*(torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1) for m in layers[:2])]
    updates.append(_with_backend(FoldedAdamW(thin.parameters(), thin, lr=1e-2, weight_decay=0.1), backend))
    mean = 0.3 * torch.randn_like(exact.weight)
    for _ in range(STEPS):
        grad = mean + torch.randn_like(mean)
        for model, optimizer in zip(layers, updates, strict=True):
            optimizer.zero_grad()
            model.weight.backward(grad.to(model.basis_weight.dtype))
            optimizer.step()
    errors = [(model.weight.double() - exact.weight).abs().max().item() for model in layers]
    assert errors[2] <= 2 * errors[1] + 2 * torch.finfo(torch.float32).eps * exact.weight.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_stepped_in_float32(dtype: torch.dtype) -> None:
    _, thin = forms(convolution("depthwise", dtype))
    optimizer = FoldedAdamW([thin.transform.weight], thin, lr=1e-2, weight_decay=0)
    before = thin.transform.weight.detach().float()
    thin.transform.weight.grad = torch.randn_like(thin.transform.weight)
    optimizer.step()
    state = optimizer.state[thin.transform.weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq_root"].dtype == torch.float32
    moved = thin.transform.weight.float() - before
    single = RefConv2d.from_conv(copy.deepcopy(thin).float().fuse(), form="thin")
    rotation = optimizer._rotation(thin.transform.weight)
    gradient = thin.transform.weight.grad.float()
    signs = torch.sign(gradient @ rotation[0]) @ rotation[0].T  # Adam's first step
    assert single.form == "thin"
    torch.testing.assert_close(moved, -1e-2 * signs, rtol=0.1, atol=2 * torch.finfo(dtype).eps)


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
