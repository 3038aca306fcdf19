"""The Refocusing Transformation alone: ``W_t`` from ``W_b`` and ``W_r``, and ``dW_r`` from ``dW_t``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.agreement import Agreement, one_thread
from benchmarks.formulations import TwoConvolutions, float64_reference
from benchmarks.layers import Layer, distinct
from refconv_kernels.functional import refocus_weight

WEIGHTS = distinct(weight_only=True)


class _Case:
    """Weights of one shape, and the agreement required of them."""

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        conv = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, groups=layer.groups, dtype=dtype)
        self.module = TwoConvolutions(conv)
        self.grad = torch.randn_like(self.module.basis_weight)
        exact = float64_reference(self.module)
        with one_thread():
            expected = self.results(exact.transformed_weight, exact.transform.weight)
        self.agreement = Agreement(expected, self.results(self.transform("two_convolutions"), self.refocus))

    @property
    def refocus(self) -> Tensor:
        return self.module.transform.weight

    def transform(self, formulation: str) -> Callable[[], Tensor]:
        if formulation == "two_convolutions":
            return self.module.transformed_weight
        return lambda: refocus_weight(self.module.basis_weight, self.refocus)

    def results(self, transform: Callable[[], Tensor], refocus: Tensor) -> dict[str, Tensor]:
        weight = transform()
        (grad_refocus,) = torch.autograd.grad(weight, refocus, self.grad.to(weight.dtype))
        return {"W_t": weight.detach(), "dW_r": grad_refocus}


# The formulations of one shape are measured one after the other.
_case = functools.lru_cache(maxsize=1)(_Case)


@pytest.mark.parametrize("formulation", ["two_convolutions", "ours"])
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("layer", WEIGHTS, ids=lambda layer: layer.weight_label)
def test_weight_transform(
    layer: Layer, mode: str, formulation: str, dtype: torch.dtype, measure: Callable[..., Any]
) -> None:
    case = _case(layer, dtype)
    transform = case.transform(formulation)
    case.agreement.require(formulation, case.results(transform, case.refocus))

    def both() -> object:
        return torch.autograd.grad(transform(), case.refocus, case.grad)

    measure(
        transform if mode == "forward" else both,
        kind="weight transform",
        mode=mode,
        shape=layer.weight_label,
        case=layer.case,
        networks=WEIGHTS[layer],
        formulation=formulation,
        dtype=dtype,
        batch=None,
        bytes=layer.transform_bytes(dtype.itemsize, backward=mode != "forward"),
    )
