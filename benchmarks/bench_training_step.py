"""Whole training steps, in turns with the plain network's: forward, cross entropy, backward, and SGD with momentum."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.agreement import Agreement, one_thread, require_same_float64
from benchmarks.formulations import FORMULATIONS, as_full, float64_reference, network_formulations
from benchmarks.networks import NETWORKS, sgd, training_step
from refconv_kernels import full_to_thin, reparameterize

CLASSES = 1000
CHECKED_IMAGES = 4  # whose gradients are compared in float64


class _Case:
    """The formulations of one network, their images and labels, and the agreement required of them.

    The logits are compared in the type that is measured. The gradients are compared in float64: with fewer digits a
    ReLU whose input is near zero may go either way, and right answers differ. For the same reason the optimizer's steps
    are compared with those of PyTorch's on the same formulation, in float64.
    """

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        factory, batch, size = NETWORKS[name]
        self.modules = network_formulations(factory().to(dtype))
        self.images = torch.randn(batch, 3, size, size, dtype=dtype)
        self.labels = torch.randint(CLASSES, (batch,))
        ours = copy.deepcopy(self.modules["ours"]).double()
        two_convolutions = float64_reference(self.modules["two_convolutions"])
        self.exact = {
            "plain": reparameterize(ours),
            "two_convolutions": two_convolutions,
            "ours": ours,
            "thin": full_to_thin(ours),
        }
        with one_thread(), torch.no_grad():
            expected = {"logits": two_convolutions(self.images.double())}
            baseline = {"logits": copy.deepcopy(self.modules["two_convolutions"])(self.images)}
        self.agreement = Agreement(expected, baseline)
        self.expected_gradients = self.gradients("two_convolutions")

    def gradients(self, formulation: str) -> dict[str, Tensor]:
        """Gradients of all that is trained, by name, in float64."""
        model = self.exact[formulation]
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with one_thread():
            loss = F.cross_entropy(model(self.images[:CHECKED_IMAGES].double()), self.labels[:CHECKED_IMAGES])
            return as_full(model, dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)))

    def require(self, formulation: str) -> None:
        with torch.no_grad():
            self.agreement.require(formulation, {"logits": self.modules[formulation](self.images)})
        require_same_float64(formulation, self.gradients(formulation), self.expected_gradients)
        trained = [self.trained(formulation, stock) for stock in (False, True)]
        require_same_float64(f"{formulation}, trained", *trained)

    def trained(self, formulation: str, stock: bool) -> dict[str, Tensor]:
        """Parameters after three steps (the first differs from those that follow), in float64."""
        model = copy.deepcopy(self.exact[formulation])
        images, labels = self.images[:CHECKED_IMAGES].double(), self.labels[:CHECKED_IMAGES]
        step = training_step(model, images, labels, sgd(model, stock))
        with one_thread():
            for _ in range(3):
                step()
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


# The formulations of one network are measured one after the other.
_case = functools.lru_cache(maxsize=1)(_Case)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_training_step(name: str, formulation: str, dtype: torch.dtype, measure: Callable[..., Any]) -> None:
    case = _case(name, dtype)
    case.require(formulation)
    measure(
        training_step(case.modules[formulation], case.images, case.labels),
        kind="training step",
        mode="step",
        shape=name,
        case=None,
        networks={name.partition("_")[0]: 1},
        formulation=formulation,
        dtype=dtype,
        batch=len(case.images),
        bytes=None,  # depends on what of a network is fused
        against=training_step(case.modules["plain"], case.images, case.labels),
    )
