"""``FusedSGD``: SGD whose step on dense layers makes ``dW_r``, applies it and makes the next ``W_t``, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.sgd import SGD, sgd

from refconv_kernels.autograd import DeferredGradient
from refconv_kernels.modules import RefConv2d
from refconv_kernels.ops import KERNELS, choose

__all__ = ["FusedSGD"]

_NUMBERS = "lr", "momentum", "dampening", "weight_decay"


class FusedSGD(SGD):
    """:class:`torch.optim.SGD` with fewer passes over the refocusing weights ``W_r`` of dense layers.

    A layer's training step reads and writes tensors as large as ``W_r`` many times: to make ``W_t``, to make ``dW_r``, and in
    the optimizer. For layers that are dense, 3x3, of the full form and on the CPU (``python -m refconv_kernels info
    --problem fused_sgd`` says why another is not), this optimizer does all three in one pass, and leaves each layer the
    ``W_t`` of its next forward. In ResNet-18 on two cores that is the larger part of what RefConv costs (docs/performance.md).
    Everything else is :class:`torch.optim.SGD`'s, fused: other parameters, hyperparameters, schedules, ``state_dict``.

    From the first step on, the gradient of such a ``W_r`` is computed where it is first read: by clipping, by a gradient
    scaler, by a hook, by printing it. If nothing reads it, it never exists, and :meth:`step` sets it to None, as
    ``zero_grad()`` does. So gradients add up over several backward passes before a step, not across steps.

    Source: ours, not in the paper; equations in csrc/problem.h.

    Args:
        params: as for every optimizer of PyTorch: parameters, named parameters or groups of them.
        model: the module in which layers are looked up; those whose ``transform.weight`` is not in ``params`` are left alone.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in :class:`torch.optim.SGD`.

    Between steps, a write through ``parameter.data`` is invisible to PyTorch's version counter; call ``model.train()``
    after one.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: an option out of range.
        RuntimeError: somebody reads a gradient that was kept past the step that used it up.

    Example:
        >>> model = refocus(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten()))
        >>> optimizer = FusedSGD(model.parameters(), model, lr=0.1, momentum=0.9)
        >>> model(torch.randn(2, 8, 5, 5)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model (={model!r}) must be the torch.nn.Module whose parameters are trained")
        self._layers = {m.transform.weight: m for m in model.modules() if isinstance(m, RefConv2d) and m.form == "full"}
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; ``closure``, if given, computes the loss anew with gradients, and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            numbers = *(float(group[name]) for name in _NUMBERS), group["nesterov"], group["maximize"]
            others = []
            for p in group["params"]:
                if p.grad is not None and not (type(p.grad) is DeferredGradient and self._fused_step(p, numbers)):
                    others.append(p)
            self._plain_step(group, others)
            for p in others:  # the first step, or somebody read the gradient
                layer = self._layers.get(p)
                if layer is not None and (backend := _backend(layer, p)) != "reference":
                    layer.keep_ahead(layer.weight, backend)
        return loss

    def _fused_step(self, refocus: Any, numbers: tuple[Any, ...]) -> bool:
        """The step on a layer's ``W_r``, if its gradient was left to this optimizer."""
        layer = self._layers.get(refocus)
        if layer is None or layer.transform.weight is not refocus:
            return False
        basis = layer.basis_weight
        backend, transformed = refocus.grad.take(basis)
        if transformed is None:
            return False
        buffer = self._momentum(refocus)
        first = buffer is None
        if first:
            buffer = torch.empty_like(refocus) if numbers[1] != 0 else refocus.new_empty(0)
        run = KERNELS["fused_sgd"][backend].forward
        run(basis, transformed, refocus, buffer, layer.transform.identity, *numbers, first)
        increment_version((refocus, buffer))
        if first and numbers[1] != 0:
            self.state[refocus]["momentum_buffer"] = buffer
        refocus.grad = None
        layer.keep_ahead(transformed, backend)  # what was dW_t
        return True

    def _plain_step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """PyTorch's step, fused where it can be; parameters without a momentum yet take their first one apart."""
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in params)
        started = [p for p in params if self._momentum(p) is not None]
        for some in (started, [p for p in params if p not in set(started)]):
            buffers = [self._momentum(p) for p in some]
            sgd(
                some,
                [p.grad.read() if isinstance(p.grad, DeferredGradient) else p.grad for p in some],  # type: ignore[misc]
                buffers,
                fused=fused,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
            )
            if group["momentum"] != 0:
                for p, buffer in zip(some, buffers, strict=True):
                    self.state[p]["momentum_buffer"] = buffer

    def _momentum(self, p: Tensor) -> Tensor | None:
        return self.state[p].get("momentum_buffer") if p in self.state else None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_layers": self._layers}


def _backend(layer: RefConv2d, refocus: Tensor) -> str:
    """The backend whose kernel covers the step on ``refocus``, the layer's ``W_r``; ``"reference"`` if none does."""
    if layer.form != "full" or layer.transform.weight is not refocus or layer.basis_weight.requires_grad:
        return "reference"
    return choose("fused_sgd", layer.basis_weight, refocus, optional=True)
