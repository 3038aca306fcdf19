"""From a pretrained network to a RefConv network, and back to a plain one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from refconv_kernels.checks import is_all_zero
from refconv_kernels.modules import RefConv2d

__all__ = ["refocus", "reparameterize"]

_CONVOLUTIONS = nn.modules.conv._ConvNd


def refocus(
    model: nn.Module,
    where: Callable[[str, nn.Conv2d], bool] | None = None,
    *,
    inplace: bool = False,
    allow_empty: bool = False,
    **options: Any,
) -> nn.Module:
    """Replace the convolutions of a pretrained network by :class:`~refconv_kernels.RefConv2d` layers.

    Every plain :class:`torch.nn.Conv2d` with a kernel larger than 1x1 is replaced, its weight becoming the
    frozen basis (Refocusing Learning, paper section III-C). Left alone are 1x1 convolutions, subclasses of
    ``nn.Conv2d``, kernels smaller than ``map_size`` or all zero, weights that are tied to another module or
    computed (weight norm, pruning), and other kinds of convolution; :func:`~refconv_kernels.summary` lists
    them with the reason. A module used in several places stays one module. Names do not change.

    Args:
        model: any module; a single ``nn.Conv2d`` too.
        where: ``where(name, conv) -> bool`` selects among the eligible convolutions; None takes all.
        inplace: change ``model`` itself; False works on a deep copy.
        allow_empty: return the model unchanged when nothing is eligible, instead of raising.
        options: keyword-only arguments of :class:`~refconv_kernels.RefConv2d`. ``transform``, if given, is a
            function from the convolution to its own module.

    Returns:
        The network with its layers replaced.

    Raises:
        TypeError: ``model`` is not a module, or ``transform`` is one module for all layers.
        ValueError: nothing is eligible, or an option does not fit. ``model`` is then unchanged.

    Example:
        >>> model = refocus(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)))
        >>> [type(layer).__name__ for layer in model]
        ['RefConv2d', 'ReLU', 'Conv2d']
    """
    check_module(model)
    transform = options.pop("transform", None)
    if isinstance(transform, nn.Module) or not (transform is None or callable(transform)):
        raise TypeError(
            f"transform (={type(transform).__name__}) must be a function from the convolution to its own module: "
            "one module cannot serve layers of different shapes"
        )
    for name in ("device", "dtype"):
        if name in options:
            raise TypeError(f"{name} (={options[name]!r}) follows each convolution and cannot be given")
    model = model if inplace else copy.deepcopy(model)
    reasons = skip_reasons(model, options.get("map_size", 3), custom=transform is not None)
    chosen: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if reasons.get(name, "") is None and (where is None or where(name, module)):
            extra = {} if transform is None else {"transform": transform(module)}
            chosen[module] = RefConv2d.from_conv(module, **options, **extra)
    if not chosen and not allow_empty:
        skipped = "; ".join(
            f"{name or 'model'}: {reason or 'not selected by where'}" for name, reason in reasons.items()
        )
        raise ValueError(
            f"model ({type(model).__name__}) has no convolution to refocus ({skipped or 'no convolutions at all'}); "
            "pass allow_empty=True to get it back unchanged"
        )
    return _replace(model, chosen)


def reparameterize(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Fold every :class:`~refconv_kernels.RefConv2d` into the plain convolution that it has become.

    The result has the architecture, attributes and ``state_dict`` keys of the network before
    :func:`refocus`, and computes the same function up to rounding. Folding again changes nothing.

    Args:
        model: any module; a single ``RefConv2d`` too.
        inplace: change ``model`` itself; False works on a deep copy.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> plain = nn.Sequential(nn.Conv2d(3, 8, 3))
        >>> list(reparameterize(refocus(plain)).state_dict()) == list(plain.state_dict())
        True
    """
    check_module(model)
    model = model if inplace else copy.deepcopy(model)
    return _replace(model, {m: m.fuse() for m in model.modules() if isinstance(m, RefConv2d)})


def skip_reasons(model: nn.Module, map_size: int, *, custom: bool = False) -> dict[str, str | None]:
    """Each convolution of ``model`` by name, with the reason why it cannot be refocused; None if it can.

    ``custom``: the transformation is not the default one, so ``map_size`` does not matter.
    """
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    inside = _inside_refconv(model)
    reasons = {}
    for name, module in model.named_modules():
        if not isinstance(module, _CONVOLUTIONS) or module in inside:
            continue
        if type(module) is not nn.Conv2d:
            reason = f"{type(module).__name__} is not exactly nn.Conv2d"
        elif "weight" not in module._parameters:
            reason = "its weight is computed (weight norm, pruning)"
        elif module.kernel_size == (1, 1):
            reason = "1x1 kernel"
        elif not custom and map_size > min(module.kernel_size):
            reason = f"kernel {module.kernel_size[0]}x{module.kernel_size[1]} is smaller than map_size {map_size}"
        elif any(len(owners[id(p)]) > 1 for p in module.parameters(recurse=False)):
            reason = "its weight or bias is tied to another module"
        elif is_all_zero(module.weight):
            reason = "its weight is all zeros"
        else:
            reason = None
        reasons[name] = reason
    return reasons


def _inside_refconv(model: nn.Module) -> set[nn.Module]:
    """Modules that belong to a transformation: convolutions over kernels, not over feature maps."""
    return {inner for m in model.modules() if isinstance(m, RefConv2d) for inner in m.transform.modules()}


def _replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # every name: a shared module stays shared
            if child in new:
                parent._modules[name] = new[child]
    return new.get(model, model)


def check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model (={type(model).__name__}) must be a torch.nn.Module")
