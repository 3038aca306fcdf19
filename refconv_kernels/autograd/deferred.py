"""``dW_r`` that is computed where it is first read, for an optimizer that may never read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._pytree import tree_map

from refconv_kernels.autograd.calls import apply
from refconv_kernels.autograd.weights import RefocusWeightBackward
from refconv_kernels.ops import KERNELS

_aten = torch.ops.aten


class KnownWeight(Function):
    """``W_t`` of ``(W_b, W_r)``, given as it was computed before; its gradient is deferred. For a frozen basis.

    One result serves any number of forward and backward passes, as a parameter would.
    """

    @staticmethod
    def forward(ctx: Any, basis: Tensor, refocus: Tensor, transformed: Tensor, backend: str) -> Tensor:
        # Not by save_for_backward, whose tensors go with the first backward pass: the basis is a leaf.
        ctx.basis, ctx.version, ctx.sizes, ctx.backend = basis, basis._version, tuple(refocus.shape[1:3]), backend
        ctx.prepared = [_prepare(ctx)]
        return transformed.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # second derivatives
            return None, apply(RefocusWeightBackward, grad, ctx.basis, *ctx.sizes, ctx.backend), None, None
        try:
            deferred = ctx.prepared.pop()  # whatever other threads do
        except IndexError:  # not the first pass
            deferred = _prepare(ctx)
        deferred._gradient.grad_transformed = grad.contiguous()
        return None, deferred, None, None


def _prepare(ctx: Any) -> DeferredGradient:
    """A gradient that still waits for ``dW_t``, and its alias that PyTorch will ask for. Two tensors made by Python
    cost 10 microseconds here, where one layer follows the other, and 60 between the convolutions of a backward."""
    gradient = _Gradient(ctx.basis, ctx.version, ctx.sizes, ctx.backend)
    return DeferredGradient(gradient, alias=DeferredGradient(gradient))


class _Gradient:
    """What a :class:`DeferredGradient` and its aliases share."""

    def __init__(self, basis: Tensor, version: int, sizes: tuple[int, int], backend: str) -> None:
        self.basis, self.version, self.sizes, self.backend = basis, version, sizes, backend
        self.grad_transformed: Tensor | None = None
        self.value: Tensor | None = None

    def is_for(self, basis: Tensor) -> bool:
        return self.basis is basis and basis._version == self.version

    def read(self) -> Tensor:
        if self.value is None:
            if self.grad_transformed is None:
                raise RuntimeError(
                    "the gradient of transform.weight was used up by FusedSGD.step(): read or clone it before the step"
                )
            if not self.is_for(self.basis):
                raise RuntimeError("basis_weight changed after the forward, before the gradient of W_r was computed")
            run = KERNELS["refocus_weight"][self.backend].backward
            self.value = run(self.grad_transformed, self.basis, *self.sizes)
            self.grad_transformed = None
        return self.value


class DeferredGradient(Tensor):
    """``dW_r``, ``[N, g, k, k]``, of which only ``dW_t`` is known until something reads it.

    Any operation of PyTorch reads it, and what is done in place is done to what was read. Only adding up two of one
    layer, as repeated backward passes do, goes on with ``dW_t``. :meth:`hand_over` gives that to an optimizer.
    """

    _gradient: _Gradient
    _alias: DeferredGradient | None  # made ahead
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, gradient: _Gradient, alias: DeferredGradient | None = None) -> DeferredGradient:
        basis, (group_size, map_size) = gradient.basis, gradient.sizes
        shape = (basis.shape[0] * basis.shape[1], group_size, map_size, map_size)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=basis.dtype, device=basis.device)
        made._gradient, made._alias = gradient, alias
        return made

    def read(self) -> Tensor:
        """``dW_r``, an ordinary tensor; the same one at every call."""
        return self._gradient.read()

    def is_left_for(self, basis: Tensor) -> bool:
        """Whether this is the gradient for that basis and still unread."""
        return self._gradient.is_for(basis) and self._gradient.grad_transformed is not None

    def hand_over(self, basis: Tensor) -> tuple[str, Tensor | None]:
        """The backend, and ``dW_t``, to be overwritten; None unless this :meth:`is_left_for` that basis."""
        gradient, taken = self._gradient, None
        if gradient.is_for(basis):
            taken, gradient.grad_transformed = gradient.grad_transformed, None
        return gradient.backend, taken

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is _aten.detach.default:
            alias, args[0]._alias = args[0]._alias, None
            return cls(args[0]._gradient) if alias is None else alias
        if func is _aten.add_.Tensor and not kwargs and _add(*args):
            return args[0]
        result = func(*tree_map(_read, args), **tree_map(_read, kwargs or {}))
        return args[0] if func._schema.name.endswith("_") and isinstance(args[0], cls) else result


def _add(gradient: Any, other: Any) -> bool:
    """Whether ``gradient += other`` could be done with ``dW_t``."""
    if not (isinstance(gradient, DeferredGradient) and isinstance(other, DeferredGradient)):
        return False
    into, more = gradient._gradient, other._gradient
    if into.grad_transformed is None or more.grad_transformed is None:
        return False
    if into.basis is not more.basis or into.version != more.version:
        return False
    into.grad_transformed += more.grad_transformed
    return True


def _read(argument: Any) -> Any:
    return argument.read() if isinstance(argument, DeferredGradient) else argument


def _reading(name: str) -> Any:
    method = getattr(Tensor, name)
    return lambda self, *args, **kwargs: method(self.read(), *args, **kwargs)


# What does not go through PyTorch's dispatcher, or needs memory of its own.
for _name in ("__array__", "__deepcopy__", "__dlpack__", "__reduce_ex__", "__repr__", "data_ptr", "numpy", "tolist"):
    setattr(DeferredGradient, _name, _reading(_name))
