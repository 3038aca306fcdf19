"""``FoldedAdamW`` on the thin form against ``torch.optim.AdamW`` on the full form."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refconv_kernels import FoldedAdamW, RefConv2d, refocus, use_backend

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
