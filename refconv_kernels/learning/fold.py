"""From a file of a refocused network to one of the plain network, without building either."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from refconv_kernels import variant
from refconv_kernels.functional import refocus_weight, thin_refocus_weight
from refconv_kernels.learning.arms import ARMS
from refconv_kernels.learning.checkpoint import read_weights, write_weights
from refconv_kernels.learning.errors import CheckFailed, CheckpointError

__all__ = ["check_fold", "fold_file", "fold_weights"]


def fold_file(source: Path, output: Path, *, identity: bool | None = None) -> int:
    """Write the plain network's ``state_dict``: ``python -m refconv_kernels fold``.

    Args:
        source: a checkpoint of ``learn`` or the folder of a training; or the ``state_dict`` of a refocused network,
            of this library or the authors', as safetensors or ``.pth``.
        output: ``.safetensors``, ``.pth`` or ``.pt``.
        identity: whether the transformation adds ``W_b``; None takes what the checkpoint says, or True.

    Returns:
        The number of layers that were folded.

    Raises:
        CheckpointError: a file cannot be read or written, or its transformation is not of this library.
    """
    if output.suffix not in (".safetensors", ".pth", ".pt"):
        raise CheckpointError(f"output (={str(output)!r}) must end in .safetensors, .pth or .pt")
    weights, about = read_weights(source)
    arm = ARMS.get(about.get("arm", ""))
    if identity is None:
        identity = arm is None or arm.options.get("identity", True)
    plain, layers = fold_weights(weights, identity=identity, transform=None if arm is None else arm.transform)
    write_weights(output, plain)
    return layers


def fold_weights(
    weights: Mapping[str, Tensor], *, identity: bool = True, transform: str | None = None
) -> tuple[dict[str, Tensor], int]:
    """The ``state_dict`` of the plain network from that of a refocused one.

    Args:
        weights: with ``basis_weight`` and ``transform.*`` of each layer, or the authors' ``weight`` and
            ``convmap.weight``.
        identity: the transformation adds ``W_b``.
        transform: name of the transformation in Table VII; None for the paper's own in either form.

    Returns:
        The tensors, in the same order, and the number of folded layers.

    Raises:
        CheckpointError: a transformation is not one of this library's.
    """
    layers: dict[str, str] = {}
    for ours, theirs in (("weight", "convmap.weight"), ("basis_weight", "basis_weight")):
        layers.update({k.removesuffix(theirs): ours for k in weights if f".{k}".endswith(f".{theirs}")})
    plain: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        owner = next((prefix for prefix in layers if key.startswith(prefix)), None)
        rest = key if owner is None else key[len(owner) :]
        if owner is not None and rest == layers[owner]:
            inner = "transform." if rest == "basis_weight" else "convmap."
            own = {k[len(owner + inner) :]: t for k, t in weights.items() if k.startswith(owner + inner)}
            try:
                plain[owner + "weight"] = _transformed(tensor, own, identity, transform)
            except (ValueError, RuntimeError, TypeError, KeyError) as error:
                raise CheckpointError(
                    f"layer {owner.rstrip('.') or '(the network)'} cannot be folded: {error}"
                ) from error
        elif owner is None or not rest.startswith(("transform.", "convmap.")):
            plain[key] = tensor
    return plain, len(layers)


@torch.no_grad()
def _transformed(basis: Tensor, own: dict[str, Tensor], identity: bool, transform: str | None) -> Tensor:
    if set(own) == {"weight"}:
        return refocus_weight(basis, own["weight"], identity=identity)
    if set(own) == {"weight", "factor"}:
        return thin_refocus_weight(basis, own["weight"], own["factor"], identity=identity)
    maps = [t for t in own.values() if t.dim() == 4]
    if transform is None or not maps:
        raise ValueError(
            f"its transformation has {', '.join(own) or 'no weights'}, which is none of this library's by default; "
            "fold the network itself with refconv_kernels.reparameterize"
        )
    groups, map_size = maps[0].shape[1:3]
    size = (basis.shape[2], basis.shape[3])
    conv = nn.Conv2d(basis.shape[1] * groups, basis.shape[0], size, groups=groups, device="meta", dtype=basis.dtype)
    module = variant(transform, conv, map_size=map_size, identity=identity).to_empty(device=basis.device)
    module.load_state_dict(own)
    return module(basis)


@torch.no_grad()
def check_fold(refocused: nn.Module, folded: nn.Module, images: Tensor) -> float:
    """Compare a folded network with the one it comes from, in eval mode, in which both are left.

    Args:
        refocused, folded: the networks.
        images: ``[B, C, H, W]``.

    Returns:
        The largest absolute difference of their logits.

    Raises:
        CheckFailed: the logits differ by more than rounding.
    """
    before, after = refocused.eval()(images), folded.eval()(images)
    difference, limit = (before - after).abs().max().item(), 1e-4 * max(1.0, before.abs().max().item())
    if not difference <= limit:
        raise CheckFailed(f"folding changed the logits by {difference:.3g}; rounding explains at most {limit:.3g}")
    return difference
