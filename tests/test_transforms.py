"""The Refocusing Transformation as a module."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from refconv_kernels import RefocusingTransformation
from refconv_kernels.transforms import INITS


@pytest.mark.parametrize(
    ("init", "bound"),
    [
        ("xavier", math.sqrt(6 / (9 * 40 + 9 * 200))),  # fans of W_r itself: g k^2 in, N k^2 out
        ("kaiming", 1 / math.sqrt(9 * 40)),  # nn.Conv2d's default, uniform with a = sqrt(5)
        ("xavier_grouped", math.sqrt(6 / (9 * 40 + 9 * 40))),
    ],
)
def test_initial_distribution(init: str, bound: float) -> None:
    weight = RefocusingTransformation(200, 40, init=init).weight.detach()
    assert weight.shape == (200, 40, 3, 3)
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.999 * bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(weight.mean().item()) < 0.01 * bound


def test_zero_initialisation_is_the_identity() -> None:
    basis = torch.randn(6, 1, 3, 3)
    assert torch.equal(RefocusingTransformation(6, 6, init="zeros")(basis), basis)


def test_xavier_and_kaiming_are_torchs() -> None:
    """Same seed, same numbers as torch's initialisers on a weight of this shape."""
    torch.manual_seed(3)
    got = RefocusingTransformation(8, 4).weight
    torch.manual_seed(3)
    assert torch.equal(got, torch.nn.init.xavier_uniform_(torch.empty(8, 4, 3, 3)))
    torch.manual_seed(3)
    got = RefocusingTransformation(8, 4, init="kaiming").weight
    torch.manual_seed(3)
    assert torch.equal(got, torch.nn.Conv2d(8, 8, 3, groups=2, bias=False).weight)


def test_without_identity_is_the_difference() -> None:
    basis = torch.randn(6, 1, 3, 3, dtype=torch.float64)
    transform = RefocusingTransformation(6, 6, dtype=torch.float64)
    without = RefocusingTransformation(6, 6, identity=False, dtype=torch.float64)
    without.load_state_dict(transform.state_dict())
    torch.testing.assert_close(transform(basis) - basis, without(basis))


def test_reset_parameters_draws_anew() -> None:
    transform = RefocusingTransformation(6, 6)
    before = transform.weight.detach().clone()
    transform.reset_parameters()
    assert not torch.equal(transform.weight, before)


def test_repr_and_dtype() -> None:
    transform = RefocusingTransformation(6, 3, 5, init="zeros", identity=False, dtype=torch.float64)
    assert repr(transform) == "RefocusingTransformation(6, 3, map_size=5, init='zeros', identity=False)"
    assert transform.weight.dtype == torch.float64
    assert set(INITS) == {"xavier", "xavier_normal", "zeros", "kaiming", "xavier_grouped"}


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((6, 6, 2), {}, r"map_size \(=2\) must be a positive odd int"),
        ((6, 6, -1), {}, r"map_size \(=-1\) must be a positive odd int"),
        ((6, 6, 3.0), {}, r"map_size \(=3.0\) must be a positive odd int"),
        ((6, 6), {"init": "normal"}, r"init \(='normal'\) must be one of \('xavier', 'xavier_normal', 'zeros'"),
        ((6, 4), {}, r"kernels \(=6\) must be divisible by group_size \(=4\)"),
    ],
)
def test_errors(args: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RefocusingTransformation(*args, **options)
