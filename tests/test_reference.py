"""The reference path against loops written from the equations."""

from __future__ import annotations

import pytest
import torch

from refconv_kernels import reference
from tests import loops
from tests.cases import CASES, Case

NUMERIC = [c for c in CASES if c.padding_mode == "zeros" and not isinstance(c.padding, str)]


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_refocus_weight(case: Case, identity: bool) -> None:
    basis, refocus, _ = case.tensors()
    got = reference.refocus_weight(basis, refocus, identity)
    torch.testing.assert_close(got, loops.refocus_weight(basis, refocus, case.groups, identity))


@pytest.mark.parametrize("case", NUMERIC, ids=str)
def test_refconv2d(case: Case) -> None:
    x, (basis, refocus, bias) = case.input(), case.tensors()
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    want = loops.conv2d(x, loops.refocus_weight(basis, refocus, case.groups, True), bias, *geometry)
    torch.testing.assert_close(reference.refconv2d(x, basis, refocus, bias, *geometry), want)


@pytest.mark.parametrize("case", NUMERIC, ids=str)
def test_backward_formulas_are_the_gradients(case: Case) -> None:
    x, (basis, refocus, _) = case.input().requires_grad_(), case.tensors()
    basis.requires_grad_(), refocus.requires_grad_()
    transformed = reference.refocus_weight(basis, refocus, True)
    grad = torch.randn_like(transformed)
    want = torch.autograd.grad(transformed, (basis, refocus), grad)
    got = reference.refocus_weight_backward(grad, basis, refocus, True, True, True)
    torch.testing.assert_close(got, want)

    weight = transformed.detach().requires_grad_()
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    y = reference.conv2d(x, weight, None, *geometry)
    grad = torch.randn_like(y)
    want = torch.autograd.grad(y, (x, weight), grad)
    got = reference.conv2d_backward(grad, x, weight, *geometry, (True, True, True))
    torch.testing.assert_close(got[:2], want)
    torch.testing.assert_close(got[2], grad.sum((0, 2, 3)))


def test_zero_refocus_is_the_identity_bit_for_bit() -> None:
    basis = torch.randn(8, 1, 3, 3)
    assert torch.equal(reference.refocus_weight(basis, torch.zeros(8, 8, 3, 3), True), basis)
    assert torch.equal(reference.refocus_weight(basis, torch.zeros(8, 8, 3, 3), False), torch.zeros_like(basis))


@pytest.mark.parametrize(("c_out", "c_in", "groups"), [(6, 6, 6), (8, 4, 4), (12, 8, 4), (5, 3, 1)])
def test_refocus_groups_are_those_of_eq_2(c_out: int, c_in: int, groups: int) -> None:
    """A change to one basis kernel reaches exactly the kernels of its own group of g consecutive ones."""
    kernels = c_out * c_in // groups
    basis = torch.randn(c_out, c_in // groups, 3, 3, dtype=torch.float64)
    refocus = torch.randn(kernels, groups, 3, 3, dtype=torch.float64)
    before = reference.refocus_weight(basis, refocus, False).reshape(kernels, -1)
    for n in range(kernels):
        changed = basis.clone()
        changed.view(kernels, 3, 3)[n] += 1
        after = reference.refocus_weight(changed, refocus, False).reshape(kernels, -1)
        reached = (after != before).any(1).nonzero().flatten().tolist()
        first = n // groups * groups
        assert reached == list(range(first, first + groups))
