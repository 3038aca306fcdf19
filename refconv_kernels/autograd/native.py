"""The autograd Functions in C++ (``csrc/autograd``), for calls that were made before through the ones in Python.

They use torch's C++ interface, so they are loaded only into the release of torch that they were built with. Whatever is
unusual about a call or its backward is left to Python: tracing, ``torch.func``, subclasses and modes, gradients of the
basis, second derivatives.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from refconv_kernels import ops
from refconv_kernels.autograd.convolution import GroupedConv2d
from refconv_kernels.autograd.layers import RefConv2d, ThinRefConv2d
from refconv_kernels.autograd.weights import RefocusWeight, ThinRefocusWeight
from refconv_kernels.backends import cpu

#: In the order of ``Kind`` in csrc/autograd/functions.h.
_FUNCTIONS: tuple[type[Function], ...] = RefocusWeight, ThinRefocusWeight, GroupedConv2d, RefConv2d, ThinRefConv2d
REFOCUS_WEIGHT, THIN_REFOCUS_WEIGHT, GROUPED_CONV2D, REFCONV2D, THIN_REFCONV2D = range(len(_FUNCTIONS))


def _load() -> tuple[ModuleType | None, str | None]:
    if cpu.native is None:
        return None, "the native library is not there"
    built, here = cpu.native.build_info()["torch_headers"], torch.__version__.partition("+")[0]
    if built != here:
        return None, f"built with torch {built}, this is {here}: reinstall refconv_kernels to have them"
    try:
        from refconv_kernels import _autograd  # type: ignore[attr-defined]
    except ImportError as error:
        return None, cpu.why_not_built("_autograd") or str(error)
    _autograd.set_backward(_backward)
    return _autograd, None


def _backward(
    number: int,
    grad: Tensor,
    saved: list[Tensor],
    needs: tuple[bool, ...],
    geometry: tuple[Any, ...],
    identity: bool,
    own: bool,
) -> tuple[Tensor | None, ...]:
    """What the Function of that number computes in Python: one gradient for each of ``needs``, its tensors."""
    function = _FUNCTIONS[number]
    context = SimpleNamespace(
        saved_tensors=saved, needs_input_grad=needs, geometry=geometry, identity=identity, own=own, backend="cpu"
    )
    grads = (grad, None) if function is RefConv2d else (grad,)  # its second output is W_t
    return function.backward(context, *grads)[: len(needs)]


def call(*arguments: Any) -> Tensor | None:
    """The output of a call that was :func:`remember`-ed; None if it was not, or has to be made in Python.

    Arguments: the number of the Function, its tensors, ``identity``, and of a convolution ``stride``, ``padding``,
    ``dilation``, ``groups`` and ``padding_mode`` as they were given.
    """
    if _native is None or not ops.recalls():
        return None
    return _native.call(*arguments)


def remember(backend: str, own: bool, *arguments: Any) -> None:
    """Note that such calls, with any tensors of these shapes, are run by ``backend``. ``own``: its convolution, not
    PyTorch's."""
    if _native is not None and backend == "cpu" and ops.recalls():
        _native.remember(own, *arguments)


_native, unavailable = _load()  #: ``unavailable``: why there are none, None if there are
