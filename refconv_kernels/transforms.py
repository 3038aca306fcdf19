"""Refocusing Transformations: modules that map basis weights to transformed weights of the same shape."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from refconv_kernels.functional import refocus_weight

__all__ = ["INITS", "RefocusingTransformation"]

INITS = ("xavier", "zeros", "kaiming", "xavier_grouped")


class RefocusingTransformation(nn.Module):
    """``T(W_b) = W_b * W_r + W_b`` (RefConv, Eq. 1), the paper's transformation in its full form.

    Its parameter ``weight`` is ``W_r``, ``[N, g, k, k]`` with ``N = C_out * C_in/g`` (Eq. 2).

    Args:
        kernels: number ``N`` of 2-D kernels in the basis.
        group_size: kernels mixed with each other, the convolution's ``groups``.
        map_size: ``k``, odd.
        init: ``"xavier"`` (``xavier_uniform_`` on ``W_r``, the paper's words), ``"zeros"`` (``W_t = W_b`` at
            first), ``"kaiming"`` (``nn.Conv2d``'s default, what the authors' code does) or
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
        check_map_size(map_size)
        if init not in INITS:
            raise ValueError(f"init (={init!r}) must be one of {INITS}")
        if group_size < 1 or kernels % group_size != 0:
            raise ValueError(f"kernels (={kernels}) must be divisible by group_size (={group_size})")
        self.map_size, self.init, self.identity = map_size, init, identity
        shape = (kernels, group_size, map_size, map_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``W_r`` anew by ``init``."""
        if self.init == "zeros":
            nn.init.zeros_(self.weight)
        elif self.init == "xavier":
            nn.init.xavier_uniform_(self.weight)
        elif self.init == "kaiming":
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        else:
            fan = self.weight[0].numel()  # g * k * k, both in and out
            bound = math.sqrt(6 / (fan + fan))
            nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, basis: Tensor) -> Tensor:
        return refocus_weight(basis, self.weight, identity=self.identity)

    def extra_repr(self) -> str:
        kernels, group_size = self.weight.shape[:2]
        text = f"{kernels}, {group_size}, map_size={self.map_size}, init={self.init!r}"
        return text if self.identity else text + ", identity=False"


def check_map_size(map_size: int) -> None:
    if not isinstance(map_size, int) or isinstance(map_size, bool) or map_size < 1 or map_size % 2 == 0:
        raise ValueError(f"map_size (={map_size!r}) must be a positive odd int")
