"""Between the full and the thin form: layers, networks, checkpoints, and the optimizers that train them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Optimizer

from refconv_kernels import thin
from refconv_kernels.checkpoints import NAMES
from refconv_kernels.modules import RefConv2d, like
from refconv_kernels.transforms import RefocusingTransformation, ThinRefocusingTransformation

__all__ = ["full_to_thin", "thin_to_full"]

Source = TypeVar("Source", nn.Module, Mapping[str, Any])
# The new transformation, and the map of what is linear in the old one's weight.
_Change = tuple[nn.Module, Callable[[Tensor], Tensor]]


def full_to_thin(source: Source, optimizer: Optimizer | None = None, *, inplace: bool = False) -> Source:
    """Change every layer of the full form to the thin one; training goes on identically (docs/numerics.md).

    ``E = W_r Q``, and the same for gradients and for the optimizer's momentum. Layers whose thin form would not be
    smaller stay as they are (:class:`~refconv_kernels.RefConv2d`, ``form``).

    Args:
        source: a layer, a network, or a ``state_dict`` of one (of the authors' module too).
        optimizer: one that trains ``source``: :class:`torch.optim.SGD` or :class:`torch.optim.ASGD`. Its parameters and
            their state are replaced, so ``inplace`` must be True.
        inplace: change ``source`` itself, which must be a module; False works on a copy.

    Returns:
        The layer, network or ``state_dict`` in the other form.

    Raises:
        TypeError: ``source`` or ``optimizer`` is something else.
        ValueError: a trainable basis, or an optimizer whose state cannot be changed. Nothing is changed then.

    Example:
        >>> model = refocus(nn.Conv2d(8, 8, 3, groups=8))
        >>> full_to_thin(model).transform.weight.shape
        torch.Size([8, 9])
    """
    return _convert(source, optimizer, inplace, _thin_layer, _thin_checkpoint)


def thin_to_full(source: Source, optimizer: Optimizer | None = None, *, inplace: bool = False) -> Source:
    """Change every layer of the thin form to the full one: ``W_r = E Q^T``, the smallest that gives the same ``W_t``.

    See :func:`full_to_thin` for arguments and errors. In a ``state_dict``, ``map_size`` is recognised by the factor.

    Example:
        >>> model = refocus(nn.Conv2d(8, 8, 3, groups=8), form="thin")
        >>> thin_to_full(model).transform.weight.shape
        torch.Size([8, 8, 3, 3])
    """
    return _convert(source, optimizer, inplace, _full_layer, _full_checkpoint)


def _convert(
    source: Any,
    optimizer: Optimizer | None,
    inplace: bool,
    layer: Callable[[str, RefConv2d], _Change | None],
    checkpoint: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> Any:
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer (={type(optimizer).__name__}) must be a torch.optim.Optimizer")
    if optimizer is not None and not inplace:
        raise ValueError("optimizer needs inplace=True: it holds the parameters of this very source")
    if isinstance(source, Mapping):
        if inplace:
            raise ValueError("inplace (=True) needs a module: a state_dict is always copied")
        return checkpoint(source)
    if not isinstance(source, nn.Module):
        raise TypeError(f"source (={type(source).__name__}) must be a torch.nn.Module or a state_dict")
    source = source if inplace else copy.deepcopy(source)
    layers = {m: change for n, m in source.named_modules() if isinstance(m, RefConv2d) and (change := layer(n, m))}
    if layers and optimizer is not None and not isinstance(optimizer, (SGD, ASGD)):
        raise ValueError(
            f"optimizer (={type(optimizer).__name__}) must be SGD or ASGD: others' state depends on the coordinates"
        )
    for module, (transform, move) in layers.items():
        old: Any = module.transform
        new: Any = like(old, transform)
        new.weight.requires_grad_(old.weight.requires_grad)
        if old.weight.grad is not None:
            new.weight.grad = move(old.weight.grad)
        module.transform = new
        module.train(module.training)  # forgets the W_t kept
        if optimizer is not None:
            _exchange(optimizer, old.weight, new.weight, move)
    return source


def _exchange(optimizer: Optimizer, old: Tensor, new: Tensor, move: Callable[[Tensor], Tensor]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if old in optimizer.state:
        state = optimizer.state.pop(old)
        optimizer.state[new] = {
            name: move(value) if isinstance(value, Tensor) and value.shape == old.shape else value
            for name, value in state.items()
        }


# --- layers -------------------------------------------------------------------------------------------------


def _thin_layer(name: str, layer: RefConv2d) -> _Change | None:
    old, basis = layer.transform, layer.basis_weight.detach()
    if not isinstance(old, RefocusingTransformation):
        return None
    if not thin.is_smaller(layer.groups, old.map_size, basis.shape[2] * basis.shape[3]):
        return None
    if layer.basis_weight.requires_grad:
        raise ValueError(f"layer {name!r} has a trainable basis: its thin form would be another model")
    new = ThinRefocusingTransformation(basis, layer.groups, old.map_size, init="zeros", identity=old.identity)
    new.init = old.init
    rotation, _ = thin.decompose(basis, layer.groups, old.map_size)
    with torch.no_grad():
        new.weight.copy_(thin.project(old.weight, rotation))
    return new, lambda tensor: thin.project(tensor, rotation)


def _full_layer(name: str, layer: RefConv2d) -> _Change | None:
    old, basis = layer.transform, layer.basis_weight.detach()
    if not isinstance(old, ThinRefocusingTransformation):
        return None
    if layer.basis_weight.requires_grad:
        raise ValueError(f"layer {name!r} has a trainable basis: its full form would be another model")
    rotation, factor = thin.decompose(basis, layer.groups, old.map_size)
    if not thin.is_factor(old.factor, factor):
        raise ValueError(f"layer {name!r}: transform.factor is not the factor of basis_weight")
    new = RefocusingTransformation(
        len(old.weight), layer.groups, old.map_size, init="zeros", identity=old.identity, device=basis.device,
        dtype=basis.dtype,
    )  # fmt: skip
    new.init = old.init
    with torch.no_grad():
        new.weight.copy_(thin.lift(old.weight, rotation, old.map_size))
    return new, lambda tensor: thin.lift(tensor, rotation, old.map_size)


# --- checkpoints --------------------------------------------------------------------------------------------


def _thin_checkpoint(state: Mapping[str, Any]) -> dict[str, Any]:
    new: dict[str, dict[str, Any]] = {}
    for prefix, (basis_name, weight_name) in _layers(state):
        basis, refocus = state[prefix + basis_name], state[prefix + weight_name]
        if refocus.dim() != 4:  # thin already
            continue
        group_size, map_size = refocus.shape[1:3]
        if not thin.is_smaller(group_size, map_size, basis.shape[2] * basis.shape[3]):
            continue
        rotation, factor = thin.decompose(basis, group_size, map_size)
        new[prefix + basis_name] = {f"{prefix}basis_weight": basis}
        new[prefix + weight_name] = {
            f"{prefix}transform.weight": thin.project(refocus, rotation),
            f"{prefix}transform.factor": factor.to(basis),
        }
    return _with(state, new)


def _full_checkpoint(state: Mapping[str, Any]) -> dict[str, Any]:
    new: dict[str, dict[str, Any]] = {}
    for prefix, (basis_name, weight_name) in _layers(state):
        stored, basis = state.get(f"{prefix}transform.factor"), state[prefix + basis_name]
        if stored is None:
            continue
        coordinates = state[prefix + weight_name]
        group_size = len(coordinates) // len(stored)
        for map_size in range(1, min(basis.shape[2:]) + 1, 2):
            rotation, factor = thin.decompose(basis, group_size, map_size)
            if thin.is_factor(stored, factor):
                new[prefix + weight_name] = {prefix + weight_name: thin.lift(coordinates, rotation, map_size)}
                new[f"{prefix}transform.factor"] = {}
                break
        else:
            raise ValueError(f"{prefix}transform.factor is not the factor of {prefix}basis_weight")
    return _with(state, new)


def _layers(state: Mapping[str, Any]) -> list[tuple[str, tuple[str, str]]]:
    """Prefix and names of the layers in a checkpoint."""
    found = []
    for basis_name, weight_name in NAMES:
        for key, tensor in state.items():
            prefix = key.removesuffix(weight_name)
            if prefix == key or (prefix and not prefix.endswith(".")) or prefix + basis_name not in state:
                continue
            if isinstance(tensor, Tensor) and state[prefix + basis_name].dim() == 4:
                found.append((prefix, (basis_name, weight_name)))
    return found


def _with(state: Mapping[str, Any], new: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A copy in which the entries named in ``new`` have others in their place."""
    result: Any = OrderedDict()
    for key, value in state.items():
        result.update(new.get(key, {key: value}))
    if hasattr(state, "_metadata"):
        result._metadata = copy.copy(state._metadata)
    return result
