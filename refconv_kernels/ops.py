"""Operators: one schema and one fake kernel each, and the table that chooses the backend.

An operator ``name`` of a backend ``b`` is the torch operator ``refconv_b::name``. All backends share the
schema and the fake kernel defined here, so ``torch.compile``, ``torch.export`` and ``opcheck`` see them
alike. Where no kernel covers a problem, :mod:`refconv_kernels.reference` runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from refconv_kernels.backends import cpu, triton
from refconv_kernels.geometry import output_format, output_size

# --- schemas and fake kernels -------------------------------------------------------------------------------

_SCHEMAS = {
    "refocus_weight": "(Tensor basis, Tensor refocus, bool identity) -> Tensor",
    "refocus_weight_backward": "(Tensor grad_transformed, Tensor basis, int group_size, int map_size) -> Tensor",
    "grouped_conv2d": (
        "(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation) -> Tensor"
    ),
    "grouped_conv2d_backward": (
        "(Tensor grad_output, Tensor input, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, "
        "bool need_input, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)"
    ),
    "refconv2d": (  # the output and W_t
        "(Tensor input, Tensor basis, Tensor refocus, Tensor? bias, bool identity, int[2] stride, int[2] padding, "
        "int[2] dilation) -> (Tensor, Tensor)"
    ),
    "refconv2d_backward": (  # the gradients of the input, of W_t, of W_r and of the bias
        "(Tensor grad_output, Tensor input, Tensor transformed, Tensor basis, int group_size, int map_size, "
        "int[2] stride, int[2] padding, int[2] dilation, bool need_input, bool need_basis, bool need_refocus, "
        "bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
}


def _fake_refocus_weight(basis: Tensor, refocus: Tensor, identity: bool) -> Tensor:
    return basis.new_empty(basis.shape)


def _fake_refocus_weight_backward(grad_transformed: Tensor, basis: Tensor, group_size: int, map_size: int) -> Tensor:
    return basis.new_empty(basis.shape[0] * basis.shape[1], group_size, map_size, map_size)


def _fake_grouped_conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    size = output_size(input, weight, stride, padding, dilation)
    output = input.new_empty(input.shape[0], weight.shape[0], *size)
    return output.to(memory_format=output_format(input, weight))


def _fake_grouped_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        input.new_empty(input.shape).to(memory_format=output_format(input, weight))
        if need_input
        else input.new_empty(0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


def _fake_refconv2d(
    input: Tensor,
    basis: Tensor,
    refocus: Tensor,
    bias: Tensor | None,
    identity: bool,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor]:
    output = _fake_grouped_conv2d(input, basis, bias, stride, padding, dilation)
    return output, _fake_refocus_weight(basis, refocus, identity)


def _fake_refconv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    transformed: Tensor,
    basis: Tensor,
    group_size: int,
    map_size: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    need_input: bool,
    need_basis: bool,
    need_refocus: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_weight = need_basis or need_refocus
    grad_input, grad_weight, grad_bias = _fake_grouped_conv2d_backward(
        grad_output, input, transformed, stride, padding, dilation, need_input, need_weight, need_bias
    )
    grad_refocus = _fake_refocus_weight_backward(transformed, basis, group_size, map_size)
    return grad_input, grad_weight, grad_refocus if need_refocus else basis.new_empty(0), grad_bias


_FAKES: dict[str, Callable[..., Any]] = {
    "refocus_weight": _fake_refocus_weight,
    "refocus_weight_backward": _fake_refocus_weight_backward,
    "grouped_conv2d": _fake_grouped_conv2d,
    "grouped_conv2d_backward": _fake_grouped_conv2d_backward,
    "refconv2d": _fake_refconv2d,
    "refconv2d_backward": _fake_refconv2d_backward,
}


def _register(backend: str) -> None:
    for name, schema in _SCHEMAS.items():
        torch.library.define(f"refconv_{backend}::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"refconv_{backend}::{name}", _FAKES[name])


# --- the table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One operator of one backend: its forward and backward, and which problems it is for."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    limits: Callable[..., str | None]  # why a problem is not covered; None when it is
    slower: Callable[..., str | None]  # why "auto" leaves a covered problem to PyTorch; None when it does not
    how: Callable[..., str | None] | None = None  # which of several kernels runs a covered problem, and why


#: Why a backend cannot run here; None when it can.
UNAVAILABLE: dict[str, str | None] = {
    "reference": None,
    "cpu": cpu.unavailable(),
    "triton": triton.unavailable(),
    "cuda": "no CUDA kernels in this version",
}

#: ``KERNELS[operator][backend]``, best backend first. What is not listed runs on the reference path.
KERNELS: dict[str, dict[str, Kernel]] = {"refocus_weight": {}, "grouped_conv2d": {}, "refconv2d": {}}


def _add(backend: str, module: ModuleType) -> None:
    """Enter all operators of a backend, whose module says for each what it is for."""
    _register(backend)
    for name, implementation in getattr(module, "IMPLEMENTATIONS", {}).items():  # of C++ ones importing was enough
        torch.library.impl(f"refconv_{backend}::{name}", module.DISPATCH_KEY)(implementation)
    operators = getattr(torch.ops, f"refconv_{backend}")
    for name, kernels in KERNELS.items():
        kernels[backend] = Kernel(
            getattr(operators, name).default,
            getattr(operators, f"{name}_backward").default,
            getattr(module, f"{name}_limits"),
            getattr(module, f"{name}_slower"),
            getattr(module, f"{name}_how", None),
        )


for _backend, _module in (("cpu", cpu), ("triton", triton)):
    if UNAVAILABLE[_backend] is None:
        _add(_backend, _module)


def _checked(name: str, source: str) -> str:
    if name != "auto" and name not in UNAVAILABLE:
        raise ValueError(f"{source} (={name!r}) must be one of {('auto', *UNAVAILABLE)}")
    reason = UNAVAILABLE.get(name)
    if reason is not None:
        raise RuntimeError(f"{source} (={name!r}) cannot run here: {reason}")
    return name


_wanted = _checked(os.environ.get("REFCONV_BACKEND") or "auto", "REFCONV_BACKEND")


def current_backend() -> str:
    """The backend asked for: ``"auto"`` unless ``REFCONV_BACKEND`` or :func:`use_backend` says otherwise."""
    return _wanted


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the kernels for the block: ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"`` or ``"auto"``.

    ``"auto"``, the default, takes the best kernel that covers each problem, and the reference path where none
    does or where PyTorch's own was measured to be faster. A backend named outright never falls back: a problem
    that one of its kernels does not cover raises. (Convolutions that are not depthwise may be PyTorch's on every
    backend.) The choice holds for the whole process, and for the backward of what was computed inside the block.

    Raises:
        ValueError: the name is not a backend.
        RuntimeError: the backend cannot run here; the message says why.

    Example::

        with refconv_kernels.use_backend("reference"):
            y = layer(x)
    """
    global _wanted
    before, _wanted = _wanted, _checked(name, "name")
    try:
        yield
    finally:
        _wanted = before


def choose(operator: str, *problem: Any, optional: bool = False) -> str:
    """The backend that runs ``operator`` on ``problem`` (the arguments of its ``limits`` and ``slower``).

    Exported programs and forward-mode differentiation always take the reference path. ``optional`` is for an
    operator that others can stand in for: a backend that does not cover the problem is no error then.

    Raises:
        RuntimeError: a backend was asked for by name and does not cover the problem.
    """
    # The flag behind torch.compiler.is_exporting(), which torch 2.11 takes for True in whatever it compiles.
    if _wanted == "reference" or torch.compiler._is_exporting_flag or forward_ad._current_level >= 0:
        return "reference"
    kernels = KERNELS[operator]
    if _wanted == "auto":
        for backend, kernel in kernels.items():
            if kernel.limits(*problem) is None and kernel.slower(*problem) is None:
                return backend
        return "reference"
    if optional and _wanted not in kernels:
        return "reference"
    reason = kernels[_wanted].limits(*problem)
    if reason is not None and optional:
        return "reference"
    if reason is not None:
        raise RuntimeError(f"backend {_wanted!r} does not cover this {operator}: {reason}")
    return _wanted
