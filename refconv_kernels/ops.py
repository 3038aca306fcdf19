"""The table of operators and backends, and the choice among them.

An operator ``name`` of a backend ``b`` is the torch operator ``refconv_b::name``. All backends share its
schema and its fake kernel (:mod:`refconv_kernels.schemas`), so ``torch.compile``, ``torch.export`` and ``opcheck`` see
them alike. Where no kernel covers a problem, :mod:`refconv_kernels.reference` runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from refconv_kernels.backends import cpu, triton
from refconv_kernels.schemas import SCHEMAS, register


@dataclass(frozen=True)
class Kernel:
    """One operator of one backend: its forward and backward, if it has one, and which problems it is for."""

    forward: Callable[..., Any]
    backward: Any  # a callable; None for an operator that has none
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
KERNELS: dict[str, dict[str, Kernel]] = {name: {} for name in SCHEMAS if not name.endswith("_backward")}


def _add(backend: str, module: ModuleType) -> None:
    """Enter all operators of a backend, whose module says for each what it is for."""
    register(backend)
    for name, implementation in getattr(module, "IMPLEMENTATIONS", {}).items():  # of C++ ones importing was enough
        torch.library.impl(f"refconv_{backend}::{name}", module.DISPATCH_KEY)(implementation)
    operators = getattr(torch.ops, f"refconv_{backend}")
    for name, kernels in KERNELS.items():
        if not hasattr(module, f"{name}_limits"):
            continue
        kernels[backend] = Kernel(
            getattr(operators, name).default,
            getattr(operators, backward).default if (backward := f"{name}_backward") in SCHEMAS else None,
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
    if not _kernels_may_run():
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


_chosen: dict[Any, Any] = {}
_MOST_CHOSEN = 4096


def recalls() -> bool:
    """Whether what was chosen before holds now: not while something is traced or a backend was named."""
    return _wanted == "auto" and not torch.compiler.is_compiling() and _kernels_may_run()


def recall(problem: Any) -> Any:
    """What :func:`remember` was told of ``problem``; None if nothing, or if it might not hold now.

    For callers that check and choose at length what is the same at every step: after an operation that went through the
    caches, each of a dozen small functions costs microseconds.
    """
    return _chosen.get(problem) if recalls() else None


def remember(problem: Any, answer: Any) -> None:
    """Note, for :func:`recall`, what was chosen for ``problem``, which names everything that the choice depends on."""
    if recalls():
        if len(_chosen) >= _MOST_CHOSEN:
            _chosen.clear()
        _chosen[problem] = answer


def still_chosen(backend: str) -> bool:
    """Whether :func:`choose`, which answered ``backend`` before, would not answer otherwise by now."""
    return _wanted in ("auto", backend) and _kernels_may_run()


def _kernels_may_run() -> bool:
    # The flag behind torch.compiler.is_exporting(), which torch 2.11 takes for True in whatever it compiles.
    return _wanted != "reference" and not torch.compiler._is_exporting_flag and forward_ad._current_level < 0
