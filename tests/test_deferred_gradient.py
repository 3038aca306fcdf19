"""The gradient of ``W_r`` that is computed when it is read: whoever reads it gets ``dW_r``."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refconv_kernels import FusedSGD, RefConv2d, functional, use_backend
from refconv_kernels.autograd import DeferredGradient
from tests.conftest import needs_native
from tests.sgd_pairs import FUSED, assert_same, backward, both, deferred, images, network, stepped, train

pytestmark = needs_native


HOW = (
    "clip",
    "scale",
    "decay in the loss",
    "hook",
    "hook later",
    "hook after accumulation",
    "hook after accumulation later",
)


@pytest.mark.parametrize("how", HOW)
def test_whatever_reads_the_gradient_gets_dw_r(how: str) -> None:
    (plain, sgd), (ours, fused) = both(network(), momentum=0.9)
    seen: dict[nn.Module, list[Tensor]] = {plain: [], ours: []}
    for model, optimizer in ((plain, sgd), (ours, fused)):
        weight = model[2].transform.weight
        for step in range(4):
            if step == 2 * how.endswith("later"):
                if how.startswith("hook after"):
                    weight.register_post_accumulate_grad_hook(
                        lambda p, model=model: seen[model].append(p.grad.abs().sum())
                    )
                elif how.startswith("hook"):
                    weight.register_hook(lambda grad, model=model: seen[model].append(grad.norm()) or 2 * grad)
            optimizer.zero_grad()
            loss = model(images(step)).square().mean()
            if how == "decay in the loss":
                loss = loss + weight.square().sum()
            loss.backward()
            if how == "clip":
                seen[model].append(nn.utils.clip_grad_norm_(model.parameters(), 0.01))
            if how == "scale":
                for p in model.parameters():
                    if p.grad is not None:
                        p.grad *= 3
            optimizer.step()
    torch.testing.assert_close(seen[ours], seen[plain])
    assert bool(seen[ours]) == ("hook" in how or how == "clip")
    assert_same(ours, plain)


def test_gradients_of_several_backward_passes_add_up_unread() -> None:
    (plain, sgd), (ours, fused) = both(network(), momentum=0.9)
    for model, optimizer in ((plain, sgd), (ours, fused)):
        train(model, optimizer, 1)
        for step in range(4):
            optimizer.zero_grad()
            for part in range(3):
                backward(model, images(10 * step + part))
            optimizer.step()
        optimizer.zero_grad()
        backward(model, images(50))
        if model is ours:
            assert deferred(ours) == FUSED
            ours[0].transform.weight.grad.norm()  # one read, one not yet
        backward(model, images(51))
        optimizer.step()
    assert_same(ours, plain)


def test_one_w_t_serves_every_pass_until_the_next_step() -> None:
    (plain, sgd), (ours, fused) = both(network(), momentum=0.9)
    for model, optimizer in ((plain, sgd), (ours, fused)):
        train(model, optimizer, 1)
        optimizer.zero_grad()
        loss = sum(model(images(seed)).square().mean() for seed in (1, 2))  # two forwards, one backward
        loss.backward(retain_graph=True)
        loss.backward()
        backward(model, images(3))
    layer = ours[2]
    assert layer._weight_ahead() is layer._weight_ahead()
    assert deferred(ours) == FUSED
    sgd.step()
    fused.step()
    assert_same(ours, plain)


def test_an_unread_gradient_goes_when_nobody_holds_it() -> None:
    layer, _ = stepped()
    gc.disable()
    try:
        (grad,) = torch.autograd.grad(layer(images(1)).sum(), layer.transform.weight)
        assert isinstance(grad, DeferredGradient)
        known = weakref.ref(grad._gradient)
        del grad
        assert known() is None  # and dW_t with it, without the garbage collector
    finally:
        gc.enable()


def test_a_layer_used_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = RefConv2d(3, 3, 3, padding=1, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).tanh())

    (plain, sgd), (ours, fused) = both(Twice())
    for model, optimizer in ((plain, sgd), (ours, fused)):
        train(model, optimizer)
    assert_same(ours, plain)


def gradients() -> tuple[Tensor, DeferredGradient]:
    """dW_r of the same layer, computed and deferred."""
    (plain, sgd), (ours, fused) = both(network())
    for model, optimizer in ((plain, sgd), (ours, fused)):
        train(model, optimizer, 1)
        optimizer.zero_grad()
        backward(model, images(5))
    found = ours[2].transform.weight.grad
    assert isinstance(found, DeferredGradient)
    return plain[2].transform.weight.grad, found


READERS = {
    "clone": lambda g: g.clone(),
    "detach": lambda g: g.detach() + 0,
    "data": lambda g: g.data + 0,
    "index": lambda g: g[3:7],
    "view": lambda g: g.view(-1),
    "numpy": lambda g: torch.from_numpy(g.numpy()),
    "tolist": lambda g: torch.tensor(g.tolist(), dtype=torch.float64),
    "deepcopy": copy.deepcopy,
    "pickle": lambda g: pickle.loads(pickle.dumps(g)),
    "dlpack": lambda g: torch.from_dlpack(g) + 0,
    "out": lambda g: torch.add(g, g, out=torch.empty(0, dtype=torch.float64)),
    "foreach": lambda g: torch._foreach_mul([g], 2.0)[0],
    "in place": lambda g: g.mul_(2).view(-1),
    "plus a plain one": lambda g: g.add_(torch.ones_like(g)).view(-1),
    "plus itself scaled": lambda g: g.add_(g, alpha=2).view(-1),
    "to": lambda g: g.to(torch.float32),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_reading_a_deferred_gradient(reader: Any) -> None:
    want, got = gradients()
    result = reader(got)
    assert type(result) is Tensor
    torch.testing.assert_close(result, reader(want))
    torch.testing.assert_close(got.clone(), want)  # what was done in place stays done
    assert (got.shape, got.dtype, got.device, got.is_contiguous()) == (want.shape, want.dtype, want.device, True)


def test_it_prints_as_the_tensor_it_is() -> None:
    want, got = gradients()
    assert repr(got)[:40] == repr(want)[:40]


def test_a_gradient_that_was_used_up_says_so() -> None:
    model = network()
    optimizer = FusedSGD(model.parameters(), model, lr=0.1)
    train(model, optimizer, 1)
    optimizer.zero_grad()
    backward(model, images(1))
    kept = model[2].transform.weight.grad
    read = model[0].transform.weight.grad
    norm = read.norm()
    optimizer.step()
    assert model[2].transform.weight.grad is None
    with pytest.raises(RuntimeError, match=r"used up by FusedSGD.step\(\): read or clone it before"):
        kept.norm()
    assert read.norm() == norm


def test_a_basis_that_changes_under_the_gradient() -> None:
    model = network()
    optimizer = FusedSGD(model.parameters(), model, lr=0.1)
    train(model, optimizer, 2)
    optimizer.zero_grad()
    backward(model, images(3))
    with torch.no_grad():
        model[2].basis_weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"basis_weight changed after the forward"):
        backward(model, images(4))  # must not add up with what belongs to the other basis
    with pytest.raises(RuntimeError, match=r"basis_weight changed after the forward"):
        optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, 2)


@pytest.mark.parametrize("how", ["eval", "no_grad", "reference", "trainable basis", "frozen", "hook"])
def test_where_the_gradient_is_not_deferred(how: str) -> None:
    model = network()
    optimizer = FusedSGD(model.parameters(), model, lr=0.1)
    train(model, optimizer, 2)
    layer, x = model[2], torch.randn(1, 8, 5, 5, dtype=torch.float64)
    want = functional.refconv2d(x, layer.basis_weight, layer.transform.weight, padding=1).detach()
    calls: list[int] = []
    if how == "eval":
        model.eval()
    elif how == "trainable basis":
        layer.basis_weight.requires_grad_()
    elif how == "frozen":
        layer.transform.weight.requires_grad_(False)
    elif how == "hook":
        layer.transform.register_forward_hook(lambda *_: calls.append(1))
    with torch.set_grad_enabled(how != "no_grad"), use_backend("reference" if how == "reference" else "auto"):
        y = layer(x.requires_grad_())
    torch.testing.assert_close(y.detach(), want)
    if how != "no_grad":
        y.sum().backward()
    assert not isinstance(layer.transform.weight.grad, DeferredGradient)
    assert (layer.transform.weight.grad is None) == (how in ("no_grad", "frozen"))
    assert (layer.basis_weight.grad is not None) == (how == "trainable basis")
    assert calls == ([1] if how == "hook" else [])


def test_second_derivatives() -> None:
    layer = RefConv2d(2, 3, 3, dtype=torch.float64)
    optimizer = FusedSGD(layer.parameters(), layer, lr=0.1)
    layer(torch.randn(1, 2, 4, 4, dtype=torch.float64)).sum().backward()
    optimizer.step()
    x, weight = torch.randn(1, 2, 4, 4, dtype=torch.float64), layer.transform.weight
    assert layer._weight_ahead() is not None

    def penalty(y: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(y.pow(3).sum(), weight, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), weight)[0]

    want = penalty(functional.refconv2d(x, layer.basis_weight, weight, layer.bias))
    torch.testing.assert_close(penalty(layer(x)), want)
    per_image = torch.func.vmap(layer)(x[None]), torch.func.functional_call(layer, {"transform.weight": 2 * weight}, x)
    torch.testing.assert_close(per_image[0][0], layer(x))
    torch.testing.assert_close(per_image[1], functional.refconv2d(x, layer.basis_weight, 2 * weight, layer.bias))
