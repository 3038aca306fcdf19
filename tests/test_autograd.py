"""Gradients of every order, in both modes, and under torch.func."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from refconv_kernels import RefConv2d, functional, use_backend
from tests.cases import SMALL, Case


def functions(case: Case) -> list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Each differentiable function with its tensor arguments, float64 and requiring gradients."""
    x, (basis, refocus, bias) = case.input(), case.tensors()
    options = {k: v for k, v in case.options.items() if k != "bias"}
    leaves = [t.requires_grad_() for t in (x, basis, refocus, bias)]
    thin = tuple(t.requires_grad_() for t in case.thin_tensors())
    return [
        (functional.refocus_weight, (basis, refocus)),
        (lambda b, r: functional.refocus_weight(b, r, identity=False), (basis, refocus)),
        (lambda x, w, b: functional.conv2d(x, w, b, **options), (leaves[0], basis, bias)),
        (lambda x, w: functional.conv2d(x, w, **options), (leaves[0], basis)),
        (lambda *a: functional.refconv2d(*a, **options), tuple(leaves)),
        (functional.thin_refocus_weight, thin[:3]),
        (lambda *a: functional.thin_refconv2d(*a, **options), (leaves[0], *thin)),
        (lambda x, *a: functional.thin_refconv2d(x, basis, *a, **options, identity=False), (leaves[0], *thin[1:])),
    ]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case: Case, backend: str) -> None:
    with use_backend(backend):
        for function, args in functions(case):
            assert gradcheck(function, args, check_forward_ad=True, fast_mode=True)
            for n in range(len(args)):  # each argument alone: the others then need no gradient
                alone = tuple(a.detach().requires_grad_(i == n) for i, a in enumerate(args))
                assert gradcheck(function, alone, fast_mode=True)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradgradcheck(case: Case, backend: str) -> None:
    with use_backend(backend):
        for function, args in functions(case):
            assert gradgradcheck(function, args, check_fwd_over_rev=True, fast_mode=True)
            for n in range(len(args)):
                alone = tuple(a.detach().requires_grad_(i == n) for i, a in enumerate(args))
                assert gradgradcheck(function, alone, fast_mode=True)


def test_full_gradcheck_of_one_small_layer(backend: str) -> None:
    """Every entry of the Jacobian, not a random projection of it."""
    layer = RefConv2d(2, 2, 3, stride=(2, 1), padding=1, groups=2, basis="trainable").double()
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    with use_backend(backend):
        assert gradcheck(call, (x, *values))
        assert gradgradcheck(call, (x, *values))


@pytest.mark.filterwarnings("ignore:form='thin' with basis='trainable'")
@pytest.mark.parametrize("basis", ["frozen", "trainable"])
@pytest.mark.parametrize("form", ["full", "thin"])
def test_which_parameters_get_gradients(form: str, basis: str, backend: str) -> None:
    layer = RefConv2d(4, 4, 3, groups=4, basis=basis, form=form)
    with use_backend(backend):
        layer(torch.randn(1, 4, 5, 5)).sum().backward()
    assert (layer.basis_weight.grad is not None) == (basis == "trainable")
    assert layer.transform.weight.grad is not None
    assert layer.bias.grad is not None


@pytest.mark.parametrize("form", ["full", "thin"])
def test_func_grad_and_jacobians(form: str, backend: str) -> None:
    layer = RefConv2d(3, 3, 3, padding=1, groups=3, form=form).double()
    params = {k: v.detach() for k, v in layer.named_parameters()}
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, params, (x,)).square().sum()

    with use_backend(backend):
        got = torch.func.grad(loss)(params, x)
        layer.zero_grad()
        layer(x).square().sum().backward()
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(got[name], parameter.grad)

        # Per-sample gradients, and curvature forward over reverse.
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x[:, None])
        torch.testing.assert_close(each["transform.weight"].sum(0), got["transform.weight"])
        one = {k: v for k, v in params.items() if k == "bias"}
        rest = {k: v for k, v in params.items() if k != "bias"}
        hessian = torch.func.hessian(lambda p: loss({**rest, **p}, x))(one)["bias"]["bias"]
        torch.testing.assert_close(hessian, torch.eye(3, dtype=torch.float64) * 2 * 2 * 16)
        flat = torch.func.hessian(lambda w: loss({**params, "transform.weight": w}, x))(params["transform.weight"])
        with use_backend("reference"):
            want = torch.autograd.functional.hessian(
                lambda w: loss({**params, "transform.weight": w}, x), params["transform.weight"]
            )
        torch.testing.assert_close(flat, want)


def test_vmap_over_inputs_and_weights(backend: str) -> None:
    xs, bases = torch.randn(3, 2, 4, 5, 5), torch.randn(3, 4, 1, 3, 3)
    refocus, bias = torch.randn(3, 4, 4, 3, 3), torch.randn(4)
    call = lambda x, b, r: functional.refconv2d(x, b, r, bias, padding=1, groups=4)  # noqa: E731
    with use_backend(backend):
        got = torch.vmap(call)(xs, bases, refocus)
        want = torch.stack([call(*args) for args in zip(xs, bases, refocus, strict=True)])
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.vmap(call, (0, None, None))(xs, bases[0], refocus[0])[0], want[0])


def test_vmap_over_the_thin_form(backend: str) -> None:
    shapes = (3, 2, 4, 5, 5), (3, 4, 1, 3, 3), (3, 4, 9)
    xs, bases, coordinates = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    factors = torch.stack([functional.refocus_factor(basis, 4) for basis in bases])
    call = lambda x, b, e, r: functional.thin_refconv2d(x, b, e, r, padding=1, groups=4)  # noqa: E731
    grad = torch.func.grad(lambda e, x, b, r: call(x, b, e, r).square().sum())
    with use_backend(backend):
        got = torch.vmap(call)(xs, bases, coordinates, factors)
        want = torch.stack([call(*args) for args in zip(xs, bases, coordinates, factors, strict=True)])
        torch.testing.assert_close(got, want)
        got = torch.vmap(grad)(coordinates, xs, bases, factors)
        want = torch.stack([grad(*args) for args in zip(coordinates, xs, bases, factors, strict=True)])
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("form", ["full", "thin"])
def test_backward_twice_needs_retain_graph(form: str, backend: str) -> None:
    layer = RefConv2d(4, 4, 3, groups=4, form=form)
    with use_backend(backend):
        y = layer(torch.randn(1, 4, 5, 5)).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        y.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", ["full", "thin"])
def test_activation_checkpointing(form: str, reentrant: bool, backend: str) -> None:
    layer = RefConv2d(4, 4, 3, padding=1, groups=4, form=form)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    with use_backend(backend):
        want = torch.autograd.grad(layer(x).square().sum(), [x, layer.transform.weight, layer.bias])
        y = checkpoint(lambda t: layer(layer.get_parameter("bias")[:, None, None] * 0 + t), x, use_reentrant=reentrant)
        y.square().sum().backward()
    for got, expected in zip((x.grad, layer.transform.weight.grad, layer.bias.grad), want, strict=True):
        torch.testing.assert_close(got, expected)
