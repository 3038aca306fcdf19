"""``FoldedAdamW``: AdamW on the refocusing weights ``W_r``, for layers of the thin form. Mathematics: :mod:`folded`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

from refconv_kernels import folded, guard, thin
from refconv_kernels.autocast import HALVES, no_autocast
from refconv_kernels.checks import check_model
from refconv_kernels.modules import RefConv2d
from refconv_kernels.ops import KERNELS, choose

__all__ = ["FoldedAdamW"]

_ROOT = "exp_avg_sq_root"


class FoldedAdamW(Optimizer):
    """AdamW whose steps on layers of ``form="thin"`` are those of AdamW on the full form, without ``W_r``.

    Such a layer trains ``E = W_r Q``, ``[N, r]``; AdamW on ``E`` would train another model. This optimizer gives ``E``
    the step that AdamW would take on ``W_r [N, g, k, k]``, so ``W_t`` is the full form's at every step up to rounding.
    It keeps ``r + r(r+1)/2`` numbers per row of ``E`` (54 for 3x3 kernels) where AdamW keeps ``2 g k^2``: neither
    ``W_r`` nor its gradient nor its moments exist. All other parameters are :class:`torch.optim.AdamW`'s.

    Decoupled weight decay, any learning rate schedule, and clipping by the global gradient norm, which ``E`` and
    ``W_r`` share, work as for the full form. Adam's coupled decay, ``amsgrad`` and clipping by value do not follow from
    ``E`` and are not offered. It trades arithmetic for memory, ``r(r+7)/2`` multiply-adds for each entry of ``W_r``:
    the step takes 1.6 to 3 times as long as AdamW's on ``W_r`` for 3x3 kernels, 50 times for 7x7 (docs/performance.md).

    Source: ours, not in the paper; derivation in :mod:`refconv_kernels.folded` and docs/numerics.md.

    Args:
        params: as for every optimizer of PyTorch: parameters, named parameters or groups of them.
        model: the module in which layers of the thin form are looked up; those whose ``transform.weight`` is not in
            ``params`` are left alone.
        lr, betas, eps, weight_decay, maximize: as in :class:`torch.optim.AdamW`.

    State of a thin layer's parameter: ``step``; ``exp_avg [N, r]``; ``exp_avg_sq_root [N, r(r+1)/2]``, the packed root
    of the running average of ``dE dE^T``; float64 for float64 parameters, otherwise float32. Of others: AdamW's names.

    The matrices ``Q`` come from ``basis_weight`` and again whenever that changes; a write through ``basis_weight.data``
    is not seen.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: an option out of range; a thin layer with a trainable basis, whose ``Q`` would change; a thin layer
            in ``params`` that is not in ``model``; in ``load_state_dict``, a state that does not fit.
        RuntimeError: in ``step``, a sparse gradient, or a factor that is not that of its layer's basis.

    Example:
        >>> model = refocus(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Flatten()), form="thin")
        >>> optimizer = FoldedAdamW(model.parameters(), model, lr=1e-3)
        >>> model(torch.randn(2, 8, 5, 5)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ) -> None:
        check_model(model)
        self._model = model
        self._layers: dict[Tensor, RefConv2d] = {}  # by their transform.weight, of those that are trained here
        self._rotations: dict[Tensor, tuple[Any, Tensor]] = {}  # Q transposed, and what it was made of
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options(group)
            self._layers.update(_thin_layers(self._model, group["params"]))
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure``, if given, computes the loss anew with gradients, and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in trained):
                raise RuntimeError("FoldedAdamW does not support sparse gradients")
            _adamw_step(group, {p: self.state[p] for p in trained if p not in self._layers})
            for p in trained:
                if p in self._layers:
                    with no_autocast(p):
                        self._folded_step(group, p)
        return loss

    def _folded_step(self, group: dict[str, Any], coordinates: Tensor) -> None:
        rotation, state = self._rotation(coordinates), self.state[coordinates]
        gradient = coordinates.grad.to(rotation.dtype)  # type: ignore[union-attr]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(gradient)
            state[_ROOT] = gradient.new_zeros(_root_shape(coordinates))
        if group["maximize"]:
            gradient = -gradient
        (beta1, beta2), lr = group["betas"], float(group["lr"])
        state["step"] += 1
        steps = state["step"].item()
        first = state["exp_avg"].lerp_(gradient, 1 - beta1)
        scales = 1 / (1 - beta1**steps), 1 / math.sqrt(1 - beta2**steps)
        direction, root = _folded_adam(first, state[_ROOT], gradient, rotation, beta2, *scales, group["eps"])
        state[_ROOT].copy_(root)
        coordinates.mul_(1 - lr * group["weight_decay"]).add_(direction, alpha=-lr)

    def _rotation(self, coordinates: Tensor) -> Tensor:
        """``Q`` of this layer, transposed, ``[N/g, r, g k^2]``, on the device and in the precision of the step."""
        layer = self._layers[coordinates]
        _check_frozen(layer)
        basis, transform = layer.basis_weight, layer.transform
        dtype = torch.float32 if coordinates.dtype in HALVES else coordinates.dtype
        source = basis.data_ptr(), basis._version, coordinates.device, dtype
        kept = self._rotations.get(coordinates)
        if kept is not None and kept[0] == source:
            return kept[1]
        rotation, factor = thin.decompose(basis, transform.group_size, transform.map_size)  # type: ignore[arg-type]
        if not thin.is_factor(transform.factor, factor):  # type: ignore[arg-type]
            raise RuntimeError(
                "transform.factor is not that of basis_weight: call transform.rebase(basis_weight) after changing it"
            )
        result = rotation.transpose(1, 2).to(coordinates.device, dtype).contiguous()
        self._rotations[coordinates] = source, result
        return result

    # --- state --------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`torch.optim.Optimizer.load_state_dict`; a thin layer's state that does not fit raises, and nothing
        is loaded."""
        states: dict[Tensor, dict[str, Tensor]] = {}
        # The last of the hooks sees what is loaded. PyTorch would round it to the parameters' type.
        hook = self.register_load_state_dict_pre_hook(lambda _, given: states.update(self._thin_states(given)))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        for coordinates, state in states.items():
            self.state[coordinates].update(state)

    def _thin_states(self, state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Tensor]]:
        """The moments of thin layers' parameters in a state_dict."""
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        states = {}
        for key, p in zip(saved, own, strict=False):  # another number of them is PyTorch's to name
            state = state_dict["state"].get(key)
            if p not in self._layers or not state:
                continue
            for name, shape in (("exp_avg", tuple(p.shape)), (_ROOT, _root_shape(p))):
                found = tuple(state[name].shape) if name in state else None
                if found != shape:
                    raise ValueError(
                        f"state_dict: {name} of parameter {key} (shape {found}) must have shape {shape}, as "
                        "FoldedAdamW saves it for a layer of form='thin'"
                    )
            dtype = torch.float32 if p.dtype in HALVES else p.dtype
            states[p] = {name: state[name].to(p.device, dtype) for name in ("exp_avg", _ROOT)}
        return states

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_model": self._model, "_layers": self._layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._rotations = {}


guard.EXACT.append(FoldedAdamW)


def _root_shape(coordinates: Tensor) -> tuple[int, int]:
    return coordinates.shape[0], folded.root_size(coordinates.shape[1])


def _folded_adam(
    first: Tensor,
    root: Tensor,
    gradient: Tensor,
    rotation: Tensor,
    keep: float,
    scale_first: float,
    scale_second: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The direction and the updated root (:mod:`folded`), by the kernel that covers the problem."""
    scales = scale_first, scale_second, eps
    backend = choose("folded_adam", first, optional=True)
    if backend != "reference":
        return KERNELS["folded_adam"][backend].forward(first, root, gradient, rotation, keep, *scales)
    root = folded.update_root(root, gradient, keep)
    return folded.direction(first, root, rotation, *scales), root


def _adamw_step(group: dict[str, Any], states: dict[Tensor, dict[str, Any]]) -> None:
    """AdamW, by PyTorch, on parameters that have a gradient, each given with its state."""
    for p, state in states.items():
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
    if not states:
        return
    beta1, beta2 = group["betas"]
    adamw(
        list(states),
        [p.grad for p in states],  # type: ignore[misc]
        [state["exp_avg"] for state in states.values()],
        [state["exp_avg_sq"] for state in states.values()],
        [],  # amsgrad's
        [state["step"] for state in states.values()],
        has_complex=any(p.is_complex() for p in states),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )


def _thin_layers(model: nn.Module, params: Iterable[Tensor]) -> dict[Tensor, RefConv2d]:
    """The thin layers of ``model`` by their parameter, of those in ``params``."""
    layers = [module for module in model.modules() if isinstance(module, RefConv2d) and module.form == "thin"]
    known: dict[Any, RefConv2d] = {layer.transform.weight: layer for layer in layers}
    found = {}
    for p in params:
        if p in known:
            _check_frozen(known[p])
            found[p] = known[p]
        elif guard.watches(p):
            raise ValueError(
                f"params hold the weight {tuple(p.shape)} of a layer of form='thin' that is not in model "
                f"(={type(model).__name__}): give the model that it belongs to"
            )
    return found


def _check_frozen(layer: RefConv2d) -> None:
    basis = layer.basis_weight
    if basis.requires_grad:
        raise ValueError(
            f"basis_weight {tuple(basis.shape)} of a thin layer: requires_grad (=True) must be False, FoldedAdamW "
            "follows AdamW for a frozen basis only"
        )


def _check_options(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        value = group[name]
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)) or not value >= 0:
            raise ValueError(f"{name} (={value!r}) must be a number of at least 0")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas (={betas!r}) must be two numbers in [0, 1)")
    if group.get("amsgrad"):
        raise ValueError("amsgrad (=True) must be left out: its maxima do not follow from E")
