"""The ``W_t`` that ``RefConv2d`` keeps in eval mode."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from refconv_kernels import RefConv2d, RefocusingTransformation, functional


class Counting(RefocusingTransformation):
    calls = 0

    def forward(self, basis: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(basis)


@pytest.fixture
def counting() -> RefConv2d:
    return RefConv2d(4, 4, 3, groups=4, transform=Counting(4, 4)).eval()


X = torch.randn(1, 4, 5, 5)


def test_kept_in_eval_mode_without_gradients(counting: RefConv2d) -> None:
    with torch.no_grad():
        first = counting(X)
        assert torch.equal(counting(X), first)
        assert counting.transform.calls == 1
        counting.train()(X)
        counting(X)
        assert counting.transform.calls == 3
    counting.eval()(X)
    counting(X)
    assert counting.transform.calls == 5  # gradients are wanted: computed anew


@pytest.mark.parametrize("name", ["basis_weight", "transform.weight"])
@pytest.mark.parametrize("how", ["in place", "detached", "data", "load", "optimizer", "dtype"])
def test_computed_anew_when_a_parameter_changes(counting: RefConv2d, name: str, how: str) -> None:
    parameter = counting.get_parameter(name)
    with torch.no_grad():
        counting(X)
        if how == "in place":
            parameter.mul_(2)
        elif how == "detached":
            parameter.detach().mul_(2)
        elif how == "data":
            parameter.data = 2 * parameter.data
        elif how == "load":
            counting.load_state_dict({k: 2 * v for k, v in counting.state_dict().items()})
        elif how == "dtype":
            counting.double().float()
        else:
            parameter.grad = torch.ones_like(parameter)
            torch.optim.SGD([parameter], lr=0.1).step()
        got = counting(X)
        fresh = functional.conv2d(X, counting.weight, counting.bias, groups=4)
    assert torch.equal(got, fresh)


def test_eval_forgets_what_was_kept(counting: RefConv2d) -> None:
    """The remedy for a write through ``.data``, which PyTorch's version counter does not see."""
    with torch.no_grad():
        counting(X)
        counting.transform.weight.data.mul_(2)
        counting.eval()
        assert torch.equal(counting(X), functional.conv2d(X, counting.weight, counting.bias, groups=4))


def test_kept_weight_does_not_outlive_replaced_parameters(counting: RefConv2d) -> None:
    with torch.no_grad():
        for _ in range(5):
            params = {k: torch.randn_like(v) for k, v in counting.named_parameters()}
            got = torch.func.functional_call(counting, params, (X,))
            weight = functional.refocus_weight(params["basis_weight"], params["transform.weight"])
            assert torch.equal(got, functional.conv2d(X, weight, params["bias"], groups=4))
            del params
            gc.collect()


def test_inference_mode_and_vmap_keep_nothing_wrong(counting: RefConv2d) -> None:
    with torch.no_grad():
        want = counting(X)
    with torch.inference_mode():
        assert torch.equal(counting(X), want)
    params = {k: torch.stack((v, 2 * v)).detach() for k, v in counting.named_parameters()}
    with torch.no_grad():
        both = torch.vmap(lambda p: torch.func.functional_call(counting, p, (X,)))(params)
        assert torch.equal(counting(X), want)
    torch.testing.assert_close(both[0], want)
    with torch.inference_mode():
        made_there = RefConv2d(4, 4, 3).eval()
        assert torch.equal(made_there(X), made_there(X))


def test_writing_into_the_returned_weight_changes_nothing(counting: RefConv2d) -> None:
    with torch.no_grad():
        want = counting(X)
        counting.weight.zero_()
        assert torch.equal(counting(X), want)


def test_hooks_on_the_transformation_still_run() -> None:
    """The one operator for both steps must not step over what a user attached to the first one."""
    layer, seen = RefConv2d(4, 4, 3, groups=4), []
    layer.transform.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    layer(torch.randn(1, 4, 5, 5))
    assert seen == [(4, 1, 3, 3)]
