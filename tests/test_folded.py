"""Root and direction of ``FoldedAdamW``: their definitions, and the kernels against them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from refconv_kernels import folded, ops, use_backend
from refconv_kernels.optim import folded_adamw
from tests.conftest import needs_native


def problem_of(rows: int, groups: int, columns: int, rank: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments of the operator, after some steps."""
    first, gradient = torch.randn(rows, rank, dtype=dtype), torch.randn(rows, rank, dtype=dtype)
    root, rotation = torch.zeros(rows, folded.root_size(rank), dtype=dtype), torch.randn(groups, rank, columns)
    for _ in range(rank):
        root = folded.update_root(root, torch.randn(rows, rank, dtype=dtype), 0.9)
    return first, root, gradient, rotation.to(dtype), 0.99, 2.0, 3.0, 1e-3


def test_update_root_follows_the_second_moment() -> None:
    rank, keep = 5, 0.7
    root, second = torch.zeros(3, folded.root_size(rank), dtype=torch.float64), torch.zeros(3, rank, rank).double()
    upper = torch.triu_indices(rank, rank)
    for step in range(20):
        rows = torch.randn(3, rank, dtype=torch.float64) * torch.logspace(0, -12, rank, dtype=torch.float64)
        rows[0], rows[1, step % rank] = 0, 0
        root = folded.update_root(root, rows, keep)
        second = keep * second + (1 - keep) * rows.unsqueeze(2) * rows.unsqueeze(1)
        square = torch.zeros_like(second)
        square[:, upper[0], upper[1]] = root
        scale = second.diagonal(dim1=1, dim2=2).sqrt()
        error = (square.transpose(1, 2) @ square - second).abs()
        assert (error <= 1e-14 * scale.unsqueeze(1) * scale.unsqueeze(2)).all()
    assert folded.update_root(root, torch.full_like(rows, torch.nan), keep).isnan().any(1).all()


def test_direction_in_blocks_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    first, root, _, rotation, _, *scales = problem_of(12, 3, 20, 4, torch.float64)
    want = folded.direction(first, root, rotation, *scales)
    for entries in (1, 70, 100, 170):
        monkeypatch.setattr("refconv_kernels.thin._BLOCK", entries)
        torch.testing.assert_close(folded.direction(first, root, rotation, *scales), want)
    none = folded.direction(torch.zeros_like(first), torch.zeros_like(root), rotation, 1.0, 1.0, 0.0)
    assert torch.equal(none, torch.zeros_like(first))  # 0/0


@needs_native
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "sizes", [(7, 1, 300, 9), (12, 4, 36, 9), (130, 1, 70, 4), (3, 1, 500, 49), (5, 5, 3, 1)], ids=str
)
def test_the_native_kernel(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    problem = problem_of(*sizes, dtype)
    assert ops.choose("folded_adam", problem[0]) == "cpu"
    with use_backend("reference"):
        exact = folded_adamw._folded_adam(*(t.double() if isinstance(t, Tensor) else t for t in problem))
    with use_backend("cpu"):
        got = folded_adamw._folded_adam(*problem)
        strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in problem[:4]]
        again = folded_adamw._folded_adam(*strided, *problem[4:])
    for ours, want, other in zip(got, exact, again, strict=True):
        bound = 8 * torch.finfo(dtype).eps * sizes[2] ** 0.5 * want.abs().max()
        assert (ours.double() - want).abs().max() <= bound
        assert torch.equal(ours, other)


@needs_native
def test_the_native_kernel_does_not_depend_on_threads() -> None:
    problem, before, results = problem_of(101, 1, 300, 9, torch.float32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.ops.refconv_cpu.folded_adam(*problem))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))
