"""``FusedSGD``: SGD whose step makes ``dW_r``, applies it and makes the next ``W_t``, in one pass over ``W_r``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.sgd import SGD, sgd

from refconv_kernels.autograd import DeferredGradient
from refconv_kernels.checks import check_model
from refconv_kernels.modules import RefConv2d
from refconv_kernels.ops import KERNELS, choose

__all__ = ["FusedSGD"]


class _Step(NamedTuple):
    """One layer's, before it is done."""

    layer: RefConv2d
    basis: Tensor
    refocus: Tensor
    gradient: DeferredGradient
    momentum: Tensor  # empty if there is none
    first: bool  # it holds nothing yet
    identity: bool


_NUMBERS = "lr", "momentum", "dampening", "weight_decay"


class FusedSGD(SGD):
    """:class:`torch.optim.SGD` with fewer passes over the refocusing weights ``W_r`` of the full form.

    A step reads and writes tensors as large as ``W_r`` many times: to make ``W_t``, to make ``dW_r``, and in the
    optimizer. For layers of the full form with 3x3 kernels, dense or with 8 groups and more, whose weights are
    contiguous float32 or float64 on the CPU, this optimizer does all three in one pass and leaves the layer the ``W_t``
    of its next forward: most of what RefConv costs in ResNet-18 and MobileNetV2 (docs/performance.md). Whether a layer
    is one says ``python -m refconv_kernels info --problem fused_sgd --weight 64,64,3,3``. Everything else is
    :class:`torch.optim.SGD`'s, fused: other parameters, hyperparameters, schedules, ``state_dict``.

    From the second step on, the gradient of such a ``W_r`` is computed where it is first read: by clipping, by a
    gradient scaler, by a hook, by printing it. If nothing reads it, it never exists, and :meth:`step` sets it to None,
    as ``zero_grad()`` does: that saves its memory, too. So gradients add up over the backward passes before a step, but
    not across steps.

    Under ``torch.compile`` layers do not take that ``W_t``, and gradients are ordinary ones: correct, but a
    transformation slower than :class:`torch.optim.SGD`, which is the better choice there.

    Source: ours, not in the paper; equations in csrc/problem.h.

    Args:
        params: as for every optimizer of PyTorch: parameters, named parameters or groups of them.
        model: the module in which layers are looked up, now; those whose ``transform.weight`` is not in ``params`` are
            left alone.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in :class:`torch.optim.SGD`.

    A write through ``parameter.data`` is invisible to PyTorch's version counter; call ``model.train()`` after one.

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
        check_model(model)
        layers = [module for module in model.modules() if isinstance(module, RefConv2d) and module.form == "full"]
        self._layers: dict[Any, RefConv2d] = {layer.transform.weight: layer for layer in layers}
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure``, if given, computes the loss anew with gradients, and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            others = self._fused_steps(group)
            self._plain_step(group, others)
            for p in others:  # the first step, or somebody read the gradient
                layer = self._layers.get(p)
                if layer is not None and (backend := _backend(layer, p)) != "reference":
                    transform = KERNELS["refocus_weight"][backend].forward
                    layer.keep_ahead(transform(layer.basis_weight, p, layer.transform.identity), backend)
        return loss

    def _fused_steps(self, group: dict[str, Any]) -> list[Tensor]:
        """The steps on all ``W_r`` of a group whose gradients were left to this optimizer; what else has a gradient is
        returned.

        The kernels run one after the other, between what Python does before and after all of them: each goes through
        the caches, and what Python does in between would find nothing of itself in them.
        """
        others, steps = [], []
        for p in group["params"]:
            if p.grad is not None:
                step = self._fused_step(p, group["momentum"])
                others.append(p) if step is None else steps.append(step)
        numbers = *(float(group[name]) for name in _NUMBERS), group["nesterov"], group["maximize"]
        done: list[tuple[_Step, Tensor, str]] = []
        try:
            for step in steps:
                backend, transformed = step.gradient.hand_over(step.basis)
                assert transformed is not None  # _fused_step() made sure
                run = KERNELS["fused_sgd"][backend].forward
                run(step.basis, transformed, step.refocus, step.momentum, step.identity, *numbers, step.first)
                done.append((step, transformed, backend))  # by now W_t
        finally:  # whatever ends it, what was done is noted
            for step, transformed, backend in done:
                increment_version((step.refocus, step.momentum))
                if step.first and group["momentum"] != 0:
                    self.state[step.refocus]["momentum_buffer"] = step.momentum
                step.refocus.grad = None
                step.layer.keep_ahead(transformed, backend)
        return others

    def _fused_step(self, refocus: Tensor, momentum: float) -> _Step | None:
        """The step on a layer's ``W_r``, if its gradient was left to this optimizer."""
        gradient = refocus.grad
        if not isinstance(gradient, DeferredGradient) or (layer := self._layers.get(refocus)) is None:
            return None
        basis, transform = layer.basis_weight, layer.transform
        if getattr(transform, "weight", None) is not refocus:  # by now it may be one without a weight
            return None
        if not gradient.is_left_for(basis):
            return None
        buffer = self._momentum(refocus)
        first = buffer is None
        if buffer is None:
            buffer = torch.empty_like(refocus) if momentum != 0 else refocus.new_empty(0)
        return _Step(layer, basis, refocus, gradient, buffer, first, bool(transform.identity))

    def _plain_step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """PyTorch's step, fused where it can be; parameters without a momentum yet take their first one apart."""
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in params)
        started = {p: buffer for p in params if (buffer := self._momentum(p)) is not None}
        for some in ([p for p in params if p in started], [p for p in params if p not in started]):
            buffers = [started.get(p) for p in some]
            gradients: list[Any] = [p.grad.read() if isinstance(p.grad, DeferredGradient) else p.grad for p in some]
            options = {name: group[name] for name in (*_NUMBERS, "nesterov", "maximize")}
            sgd(some, gradients, buffers, fused=fused, **options)
            if group["momentum"] != 0:
                for p, buffer in zip(some, buffers, strict=True):
                    self.state[p]["momentum_buffer"] = buffer

    def _momentum(self, p: Tensor) -> Tensor | None:
        state = self.state.get(p)  # not [p], which would begin one
        return None if state is None else state.get("momentum_buffer")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_layers": self._layers}


def _backend(layer: RefConv2d, refocus: Tensor) -> str:
    """The backend whose kernel covers the step on ``refocus``, the layer's ``W_r``; ``"reference"`` if none does."""
    if not layer.takes_ahead() or layer.transform.weight is not refocus:
        return "reference"
    return choose("fused_sgd", layer.basis_weight, refocus, optional=True)
