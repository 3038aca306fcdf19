"""A warning where the thin form would not train like the full one. Imports only torch."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

#: Optimizers that train the thin form like the full one: their steps commute with a rotation of the coordinates of a
#: parameter (docs/numerics.md), or, added by :mod:`refconv_kernels.optim`, are those of the full form.
EXACT: list[type[torch.optim.Optimizer]] = [torch.optim.SGD, torch.optim.ASGD]

_transforms: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_asked: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_hook: Any = None  # of all optimizers, from the first thin layer on


def watch(transform: nn.Module) -> None:
    """Warn when an optimizer that is not in :data:`EXACT` takes its first step on ``transform.weight``."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_before_step)
    _transforms.add(transform)


def watches(parameter: torch.Tensor) -> bool:
    """Whether ``parameter`` is the weight of a thin layer."""
    return any(parameter is transform.weight for transform in _transforms)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer in _asked:
        return
    _asked.add(optimizer)
    if isinstance(optimizer, tuple(EXACT)):
        return
    coordinates = {id(transform.weight) for transform in _transforms}
    if any(id(p) in coordinates for group in optimizer.param_groups for p in group["params"]):
        warnings.warn(
            f"{type(optimizer).__name__} trains RefConv layers of form='thin' as another model than form='full': its "
            "step is not known to be the same in other coordinates. Exact are SGD and ASGD, and in place of AdamW "
            "refconv_kernels.FoldedAdamW (docs/numerics.md)",
            stacklevel=3,
        )
