"""What a layer accepts as its ``state_dict``, and what it refuses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from refconv_kernels import functional
from refconv_kernels.checks import is_all_zero

#: Basis and refocusing weights by the names of this library, and of a plain convolution and the authors' module.
NAMES = (("basis_weight", "transform.weight"), ("weight", "convmap.weight"))


def prepare(layer: Any, state_dict: dict[str, Any], prefix: str, assign: bool) -> list[str]:
    """Complete ``state_dict`` for a :class:`~refconv_kernels.RefConv2d`; the errors that forbid loading it.

    Other names become ours. For a plain convolution the transformation stays as it is; the thin form's factor is that
    of the basis that is loaded, unless it was saved. With errors, the transformation's own tensors are put in, so that
    it, which is loaded after the layer, stays as it is too.
    """
    for ours, theirs in zip(*NAMES, strict=True):
        if prefix + theirs in state_dict and prefix + ours not in state_dict:
            state_dict[prefix + ours] = state_dict.pop(prefix + theirs)
    own = {f"{prefix}transform.{name}": t for name, t in layer.transform.state_dict(keep_vars=True).items()}
    factor = f"{prefix}transform.factor"
    if not any(key.startswith(prefix + "transform.") for key in state_dict):
        state_dict.update({key: t for key, t in own.items() if key != factor})

    basis = state_dict.get(f"{prefix}basis_weight")
    errors = []
    for key, tensor in {f"{prefix}basis_weight": layer.basis_weight, f"{prefix}bias": layer.bias, **own}.items():
        loaded = state_dict.get(key)
        if tensor is not None and isinstance(loaded, Tensor) and loaded.shape != tensor.shape:
            errors.append(f"size mismatch for {key}: {tuple(loaded.shape)} must be {tuple(tensor.shape)}")
            if key == f"{prefix}transform.weight" and loaded.dim() == {"full": 2, "thin": 4}.get(layer.form):
                change = "thin_to_full" if layer.form == "full" else "full_to_thin"
                errors[-1] += f" (a checkpoint of the other form: convert it with {change})"
    if isinstance(basis, Tensor) and is_all_zero(basis):
        errors.append(f"{prefix}basis_weight is all zeros: a frozen zero basis stays zero and gets no gradient")
    if errors:
        state_dict.update(own)
    elif layer.form == "thin" and factor not in state_dict:
        source = basis if isinstance(basis, Tensor) else layer.basis_weight
        source = source if assign else source.to(layer.basis_weight)
        state_dict[factor] = functional.refocus_factor(source, layer.groups, layer.transform.map_size)
    return errors
