"""How an autograd Function is called."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function


def apply(function: type[Function], *args: Any) -> Any:
    """``function.apply(*args)`` without what that does at every call for default arguments: 50 microseconds."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]


def derive(function: type[Function], *args: Any) -> Any:
    """What a backward computes with ``function``, recorded only if somebody asked for second derivatives."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return apply(function, *args)
    return function.forward(*args)
