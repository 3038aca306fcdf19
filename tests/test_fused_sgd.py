"""``FusedSGD`` against ``torch.optim.SGD``."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refconv_kernels import FusedSGD, RefConv2d, full_to_thin, functional
from refconv_kernels.autograd import DeferredGradient
from refconv_kernels.backends import cpu
from refconv_kernels.ops import KERNELS
from tests.conftest import needs_native
from tests.sgd_pairs import FUSED, assert_same, backward, both, deferred, images, network, stepped, train

pytestmark = needs_native

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "everything": {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.05, "maximize": True},
}


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_steps_are_sgds(options: dict[str, Any], dtype: torch.dtype, identity: bool) -> None:
    (plain, sgd), (ours, fused) = both(network(dtype, identity=identity), **options)
    for step in range(5):
        for model, optimizer in ((plain, sgd), (ours, fused)):
            optimizer.zero_grad()
            backward(model, images(step, dtype))
            assert deferred(model) == (FUSED if model is ours and step > 0 else [])
            optimizer.step()
            assert not deferred(model)
    tolerance = 1e-11 if dtype is torch.float64 else 1e-4
    assert_same(ours, plain, rtol=tolerance, atol=tolerance)
    for theirs, own in zip(sgd.state_dict()["state"].values(), fused.state_dict()["state"].values(), strict=True):
        torch.testing.assert_close(own, theirs, rtol=tolerance, atol=tolerance)
    for layer in ours[0], ours[2], ours[6]:
        kept = layer._weight_ahead()
        torch.testing.assert_close(kept.detach(), layer.weight.detach(), rtol=0, atol=16 * torch.finfo(dtype).eps)
    x = images(9, dtype)
    torch.testing.assert_close(ours(x), plain(x), rtol=tolerance, atol=tolerance)


def test_w_r_that_was_frozen_during_a_step_is_trained_afterwards() -> None:
    layer, optimizer = stepped()
    weight = layer.transform.weight
    weight.grad = torch.ones_like(weight)
    weight.requires_grad_(False)
    optimizer.step()
    weight.grad = None
    weight.requires_grad_(True)
    layer(images(1)).sum().backward()
    assert weight.grad.abs().sum() > 0


def test_the_transformation_may_be_replaced_by_one_without_a_weight() -> None:
    layer, optimizer = stepped()
    layer(images(1)).sum().backward()
    weight, before = layer.transform.weight, layer.transform.weight.detach().clone()
    layer.transform = nn.Identity()
    optimizer.step()  # with the gradient that there is
    assert not torch.equal(weight, before)
    expected = nn.functional.conv2d(images(2), layer.basis_weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(images(2)), expected)


@pytest.mark.parametrize("how", ["in place", "load", "data", "assigned data", "dtype", "basis", "transform"])
def test_w_t_is_computed_anew_when_something_changes(how: str) -> None:
    model = network()
    optimizer = FusedSGD(model.parameters(), model, lr=0.1)
    train(model, optimizer, 2)
    layer = model[2]
    with torch.no_grad():
        if how == "in place":
            layer.transform.weight.mul_(2)
        elif how == "load":
            model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()})
        elif how == "data":
            layer.transform.weight.data.mul_(2)
            model.train()
        elif how == "assigned data":
            layer.transform.weight.data = 2 * layer.transform.weight.data
        elif how == "dtype":
            model.float().double()
        elif how == "basis":
            layer.basis_weight.mul_(2)
        else:
            layer.transform = RefConv2d(8, 20, 3, dtype=torch.float64).transform
    x = torch.randn(1, 8, 5, 5, dtype=torch.float64)
    want = functional.refconv2d(x, layer.basis_weight, layer.transform.weight, padding=1)
    torch.testing.assert_close(layer(x), want)


def test_hooks_on_the_transformation_are_called_as_often_as_with_sgd() -> None:
    counts = []
    for model, optimizer in both(network()):
        calls: list[int] = []
        model[2].transform.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        train(model, optimizer, 3)
        counts.append(len(calls))
    assert counts == [3, 3]


def test_a_step_in_between_under_autocast() -> None:
    (plain, sgd), (ours, fused) = both(network(torch.float32), momentum=0.9)
    for model, optimizer in ((plain, sgd), (ours, fused)):
        for step in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(images(step, torch.float32)).float().square().mean()
            loss.backward()
            assert deferred(model) == (FUSED if model is ours and step > 0 else [])
            optimizer.step()
    assert_same(ours, plain, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("which", ["channels_last", "bfloat16"])
def test_what_no_kernel_covers_takes_pytorchs_step(which: str) -> None:
    model = network(torch.bfloat16 if which == "bfloat16" else torch.float64)
    if which == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    (plain, sgd), (ours, fused) = both(model, momentum=0.9)
    for model, optimizer in ((plain, sgd), (ours, fused)):
        train(model, optimizer)
        backward(model, images(7, next(model.parameters()).dtype))
    assert deferred(ours) == []
    tolerance = {"rtol": 5e-2, "atol": 2e-2} if which == "bfloat16" else {}
    assert_same(ours, plain, **tolerance)


@pytest.mark.filterwarnings("error")  # the guard's: SGD is exact
def test_the_thin_form_is_trained_like_the_full_one() -> None:
    full = network()
    thin = full_to_thin(full)
    for model in (full, thin):
        optimizer = FusedSGD(model.parameters(), model, lr=0.05, momentum=0.9, weight_decay=0.01)
        train(model, optimizer)
    x = images(20)
    torch.testing.assert_close(thin.eval()(x), full.eval()(x))


def test_state_is_sgds() -> None:
    (plain, sgd), (ours, fused) = both(network(), momentum=0.9, weight_decay=0.01)
    train(plain, sgd)
    train(ours, fused)
    swapped = FusedSGD(plain.parameters(), plain, lr=1), torch.optim.SGD(ours.parameters(), lr=1)
    swapped[0].load_state_dict(sgd.state_dict())
    swapped[1].load_state_dict(fused.state_dict())
    train(plain, swapped[0], first=4)
    train(ours, swapped[1], first=4)
    assert_same(ours, plain)


def test_copies_with_their_model() -> None:
    model = network()
    optimizer = FusedSGD(model.parameters(), model, lr=0.05, momentum=0.9)
    train(model, optimizer, 2)
    copies = copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))
    train(model, optimizer, 2, first=2)
    for other, its in copies:
        train(other, its, 2, first=2)
        assert_same(other, model)
        backward(other, images(5))
        assert deferred(other) == FUSED


def test_groups_schedules_and_closures() -> None:
    models = network(), None
    results = []
    for kind in (torch.optim.SGD, FusedSGD):
        model = copy.deepcopy(models[0])
        groups = [{"params": model[:3].parameters(), "lr": 0.1}, {"params": model[3:].parameters(), "momentum": 0.5}]
        optimizer = kind(groups, *([model] if kind is FusedSGD else []), lr=0.02)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
        for step in range(5):

            def closure(model: nn.Module = model, optimizer: Any = optimizer, step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = model(images(step)).square().mean()
                loss.backward()
                return loss

            loss = optimizer.step(closure)
            assert loss.requires_grad
            schedule.step()
        results.append(model)
    assert_same(results[1], results[0])


def test_only_what_was_given_is_trained() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = FusedSGD(model[:2].parameters(), model, lr=0.1)
    train(model, optimizer, 3)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"0.transform.weight", "1.weight"} <= changed
    assert not any(name.startswith(("2.", "4.", "5.", "6.")) for name in changed)
    backward(model, images(5))
    assert deferred(model) == FUSED[:1]


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    threads, results = torch.get_num_threads(), []
    torch.manual_seed(0)
    start = RefConv2d(80, 80, 3, bias=False)
    x = torch.randn(1, 80, 4, 4)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            layer = copy.deepcopy(start)
            optimizer = FusedSGD(layer.parameters(), layer, lr=0.1, momentum=0.9)
            for _ in range(3):
                optimizer.zero_grad()
                layer(x).square().sum().backward()
                grad = layer.transform.weight.grad
                if isinstance(grad, DeferredGradient):  # convolutions of PyTorch may depend on the threads
                    grad._gradient.grad_transformed.fill_(0.01)
                else:
                    grad.fill_(0.01)
                optimizer.step()
            results.append(layer.transform.weight.detach())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_step_that_is_interrupted_leaves_every_layer_before_or_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    (_, _), (model, optimizer) = both(network(), momentum=0.9)
    train(model, optimizer, 1)
    optimizer.zero_grad()
    backward(model, images(5))
    first, second = model[0].transform.weight, model[2].transform.weight
    before = second.detach().clone()
    kernel = KERNELS["fused_sgd"]["cpu"]

    def fails_at_the_second(basis: Tensor, *arguments: Any) -> None:
        if basis is model[2].basis_weight:
            raise KeyboardInterrupt
        kernel.forward(basis, *arguments)

    monkeypatch.setitem(KERNELS["fused_sgd"], "cpu", dataclasses.replace(kernel, forward=fails_at_the_second))
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert first.grad is None
    torch.testing.assert_close(model[0]._weight_ahead(), model[0].weight)
    assert torch.equal(second, before)
    later = model[6].transform.weight.grad
    assert isinstance(later, DeferredGradient)
    assert later.read().isfinite().all()


def test_which_layers_have_a_kernel() -> None:
    def why_not(shape: tuple[int, ...], groups: int, dtype: torch.dtype = torch.float32, last: bool = False) -> Any:
        basis = torch.empty(shape, dtype=dtype)
        refocus = torch.empty(shape[0] * shape[1], groups, 3, 3, dtype=dtype)
        layout = torch.channels_last if last else torch.contiguous_format
        return cpu.fused_sgd_limits(basis.contiguous(memory_format=layout), refocus)

    assert why_not((64, 64, 3, 3), 1) is None
    assert why_not((64, 1, 3, 3), 64, torch.float64) is None
    assert why_not((64, 8, 3, 3), 8) is None
    assert "3x3 kernels, dense or with rows of W_r of 64 entries" in why_not((64, 16, 3, 3), 4)
    assert "W_b (64, 1, 5, 5)" in why_not((64, 1, 5, 5), 64)
    assert "contiguous" in why_not((64, 64, 3, 3), 1, last=True)
    assert "torch.bfloat16" in why_not((64, 64, 3, 3), 1, torch.bfloat16)


def test_errors() -> None:
    model = network()
    with pytest.raises(TypeError, match=r"model \(='x'\) must be the torch.nn.Module whose parameters are trained"):
        FusedSGD(model.parameters(), "x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        FusedSGD(model.parameters(), model, lr=-1)
    optimizer = FusedSGD(model.parameters(), model, lr=0.1)
    train(model, optimizer, 2)
    with pytest.raises(ValueError, match="input has 5 channels"):
        model[0](torch.randn(1, 5, 8, 8, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"input \(='x'\) must be a torch.Tensor"):
        model[0]("x")
