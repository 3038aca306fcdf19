"""Refocusing Transformations: modules that map basis weights to transformed weights of the same shape."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from refconv_kernels import guard, thin
from refconv_kernels.checks import check_basis, check_map_size
from refconv_kernels.functional import refocus_factor, refocus_weight, thin_refocus_weight

__all__ = ["INITS", "RefocusingTransformation", "ThinRefocusingTransformation"]

INITS = ("xavier", "xavier_normal", "zeros", "kaiming", "xavier_grouped")


class RefocusingTransformation(nn.Module):
    """``T(W_b) = W_b * W_r + W_b`` (RefConv, Eq. 1), the paper's transformation in its full form.

    Its parameter ``weight`` is ``W_r``, ``[N, g, k, k]`` with ``N = C_out * C_in/g`` (Eq. 2).

    Args:
        kernels: number ``N`` of 2-D kernels in the basis.
        group_size: kernels mixed with each other, the convolution's ``groups``.
        map_size: ``k``, odd.
        init: ``"xavier"`` (``xavier_uniform_`` on ``W_r``, the paper's words), ``"xavier_normal"``, ``"zeros"``
            (``W_t = W_b`` at first), ``"kaiming"`` (``nn.Conv2d``'s default, what the authors' code does) or
            ``"xavier_grouped"`` (Xavier with the fans counted within a refocus group).
        identity: add ``W_b``; False is the paper's "w/o shortcut".

    Raises:
        ValueError: an even ``map_size``, an unknown ``init``, or sizes that do not divide.

    Example:
        >>> RefocusingTransformation(8, 8)(torch.randn(8, 1, 3, 3)).shape
        torch.Size([8, 1, 3, 3])
    """

    def __init__(
        self,
        kernels: int,
        group_size: int,
        map_size: int = 3,
        *,
        init: str = "xavier",
        identity: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_transformation(kernels, group_size, map_size, init)
        self.map_size, self.init, self.identity = map_size, init, identity
        shape = (kernels, group_size, map_size, map_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``W_r`` anew by ``init``."""
        draw_refocus(self.weight, self.init)

    def forward(self, basis: Tensor) -> Tensor:
        return refocus_weight(basis, self.weight, identity=self.identity)

    def extra_repr(self) -> str:
        kernels, group_size = self.weight.shape[:2]
        text = f"{kernels}, {group_size}, map_size={self.map_size}, init={self.init!r}"
        return text if self.identity else text + ", identity=False"


class ThinRefocusingTransformation(nn.Module):
    """``T(W_b) = E R + W_b``: :class:`RefocusingTransformation` in the coordinates that the basis sees.

    Its parameter ``weight`` is ``E``, ``[N, r]`` with ``r = min(g k^2, K_h K_w)``; its buffer ``factor`` is ``R``,
    ``[N/g, r, K_h K_w]``, a function of the basis that is saved with ``E`` and never trained. Under SGD it gives the
    ``W_t`` of the full form at every step (docs/numerics.md).

    Args:
        basis: basis weights, ``[C_out, C_in/g, K_h, K_w]``; also gives device and dtype. Not kept.
        group_size, map_size, init, identity: as in :class:`RefocusingTransformation`. On the CPU the same seed gives
            the same ``W_t`` as the full form, except for ``"xavier_normal"``: it has the same law, drawn directly.

    Raises:
        TypeError: ``basis`` is not a real floating-point tensor.
        ValueError: an even ``map_size``, an unknown ``init``, or sizes that do not divide.

    Example:
        >>> basis = torch.randn(8, 1, 3, 3)
        >>> transform = ThinRefocusingTransformation(basis, 8)
        >>> transform.weight.shape, transform(basis).shape
        (torch.Size([8, 9]), torch.Size([8, 1, 3, 3]))
    """

    factor: Tensor

    def __init__(
        self, basis: Tensor, group_size: int, map_size: int = 3, *, init: str = "xavier", identity: bool = True
    ) -> None:
        super().__init__()
        _check_init(init)
        check_basis(basis, group_size, map_size)
        self.group_size, self.map_size, self.init, self.identity = group_size, map_size, init, identity
        kernels, size = basis.shape[0] * basis.shape[1], basis.shape[2] * basis.shape[3]
        rank = min(group_size * map_size**2, size)
        self.weight = nn.Parameter(basis.new_empty(kernels, rank))
        self.register_buffer("factor", basis.new_empty(kernels // group_size, rank, size))
        self.draw(basis)
        guard.watch(self)

    def rebase(self, basis: Tensor) -> None:
        """Take ``factor`` from a new basis of the same shape; ``weight`` stays."""
        with torch.no_grad():
            self.factor.copy_(refocus_factor(basis, self.group_size, self.map_size))

    def draw(self, basis: Tensor) -> None:
        """Draw ``E`` anew by ``init``, as the ``W_r`` of a layer with this basis; ``factor`` is taken from it too."""
        if self.weight.is_meta:
            return
        rotation, factor = thin.decompose(basis, self.group_size, self.map_size)
        std = _initial_std(self.init, len(self.weight), self.group_size, self.map_size)
        with torch.no_grad():
            self.factor.copy_(factor)
            if self.init == "xavier_normal":  # a rotation of independent Gaussians is independent Gaussians
                self.weight.normal_(0, std)
            elif std == 0:
                self.weight.zero_()
            else:
                bound = math.sqrt(3) * std
                self.weight.copy_(thin.project_uniform(bound, len(self.weight), rotation, self.weight.dtype))

    def forward(self, basis: Tensor) -> Tensor:
        return thin_refocus_weight(basis, self.weight, self.factor, identity=self.identity)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        guard.watch(self)  # a copy is watched like the original

    def extra_repr(self) -> str:
        text = f"{len(self.weight)}, {self.group_size}, map_size={self.map_size}, init={self.init!r}"
        return text if self.identity else text + ", identity=False"


def check_transformation(kernels: int, group_size: int, map_size: int, init: str) -> None:
    """Raise unless there are refocusing weights ``[N, g, k, k]`` of these sizes, drawn by ``init``."""
    check_map_size(map_size)
    _check_init(init)
    if group_size < 1 or kernels % group_size != 0:
        raise ValueError(f"kernels (={kernels}) must be divisible by group_size (={group_size})")


def draw_refocus(weight: Tensor, init: str) -> None:
    """Draw refocusing weights ``W_r``, ``[N, g, k, k]``, by ``init``."""
    std = _initial_std(init, *weight.shape[:3])
    with torch.no_grad():
        if init == "xavier_normal":
            weight.normal_(0, std)
        elif std == 0:
            weight.zero_()
        else:
            weight.uniform_(-math.sqrt(3) * std, math.sqrt(3) * std)


def _check_init(init: str) -> None:
    if init not in INITS:
        raise ValueError(f"init (={init!r}) must be one of {INITS}")


def _initial_std(init: str, kernels: int, group_size: int, map_size: int) -> float:
    """Standard deviation of an entry of ``W_r [N, g, k, k]``; the uniform laws reach ``sqrt(3)`` times as far."""
    fan_in, fan_out = group_size * map_size**2, kernels * map_size**2  # as torch.nn.init counts them
    if init == "zeros":
        return 0.0
    if init == "kaiming":  # kaiming_uniform_ with a = sqrt(5)
        return math.sqrt(2 / (1 + 5)) / math.sqrt(fan_in)
    return math.sqrt(2 / (fan_in + (fan_in if init == "xavier_grouped" else fan_out)))
