"""The one warning where the thin form is another model."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from refconv_kernels import RefConv2d, refocus


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(1, 4, 5, 5)).sum().backward()
    optimizer.step(lambda: model(torch.ones(1, 4, 5, 5)).sum())


def thin() -> RefConv2d:
    return RefConv2d(4, 4, 3, groups=4, form="thin")


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.LBFGS])
def test_adaptive_optimizers_warn_once(kind: type[torch.optim.Optimizer]) -> None:
    layer = thin()
    optimizer = kind(layer.parameters(), lr=0.1)
    with pytest.warns(
        UserWarning, match=rf"{kind.__name__} trains RefConv layers of form='thin' as another model"
    ) as seen:
        step(layer, optimizer)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(layer, optimizer)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.ASGD])
def test_exact_optimizers_do_not(kind: type[torch.optim.Optimizer]) -> None:
    layer = thin()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(layer, kind([p for p in layer.parameters() if p.requires_grad], lr=0.1))


def test_only_for_optimizers_of_thin_layers() -> None:
    layer, full, dense = thin(), RefConv2d(4, 4, 3, groups=4), refocus(nn.Conv2d(4, 4, 3), form="thin")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (full, dense):
            step(model, torch.optim.Adam(model.parameters()))
        step(layer, torch.optim.Adam([layer.bias]))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_watched(copied: object) -> None:
    layer = copied(thin())
    with pytest.warns(UserWarning, match="as another model"):
        step(layer, torch.optim.Adam(layer.parameters()))


def test_trainable_basis() -> None:
    with pytest.warns(UserWarning, match="form='thin' with basis='trainable' is another model") as seen:
        RefConv2d(4, 4, 3, groups=4, form="thin", basis="trainable")
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RefConv2d(4, 4, 3, form="thin", basis="trainable")  # dense: the forms are one
