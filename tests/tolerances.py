"""How far a result may lie from the float64 reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def tolerance(dtype: torch.dtype, reduction_length: int) -> float:
    """Error allowed per unit of magnitude: rounding grows like the square root of the terms summed."""
    return 8 * torch.finfo(dtype).eps * math.sqrt(max(1, reduction_length))


def assert_close(got: Tensor, want: Tensor, reduction_length: int, dtype: torch.dtype | None = None) -> None:
    """``got`` against ``want`` (float64), scaled by the largest magnitude in ``want``.

    ``dtype``: the precision in which ``got`` was computed, if not its own.
    """
    assert got.shape == want.shape
    assert got.isfinite().all(), "not finite: a value was left unwritten"
    if got.numel():
        error = (got.to(want.dtype) - want).abs().max().item()
        bound = tolerance(dtype or got.dtype, reduction_length) * max(1.0, want.abs().max().item())
        assert error <= bound, f"error {error:.3g} exceeds {bound:.3g}"
