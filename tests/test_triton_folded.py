"""``FoldedAdamW``'s Triton kernels: on a GPU where there is one, else in Triton's interpreter (tests/conftest.py)."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from refconv_kernels import FoldedAdamW, folded, ops, refocus, use_backend
from refconv_kernels.backends import triton
from tests.test_folded import problem_of
from tests.test_optim import CASES, convolution

pytestmark = [
    pytest.mark.skipif(ops.UNAVAILABLE["triton"] is not None, reason=f"triton: {ops.UNAVAILABLE['triton']}"),
    # Triton 3.6's interpreter, which works with NumPy before 2.4 only.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    # NumPy's, in the interpreter, where 0/0 is replaced.
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned"),
]
DEVICE = "cpu" if triton.INTERPRETED else "cuda"


def on_device(problem: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(t.to(DEVICE) if isinstance(t, Tensor) else t for t in problem)


def run(problem: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    return torch.ops.refconv_triton.folded_adam(*problem)


def check(problem: tuple[Any, ...]) -> None:
    """Against the definitions in float64."""
    first, root, gradient, rotation, keep, *scales = problem
    want_root = folded.update_root(root.double(), gradient.double(), keep)
    want = folded.direction(first.double(), want_root, rotation.double(), *scales)
    for got, exact in zip(run(on_device(problem)), (want, want_root), strict=True):
        assert got.dtype == first.dtype
        bound = 8 * torch.finfo(first.dtype).eps * rotation.shape[2] ** 0.5 * exact.abs().max()
        assert (got.cpu().double() - exact).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        (7, 1, 97, 9),  # chunks of columns
        (130, 1, 13, 4),  # blocks of rows
        (72, 36, 18, 9),  # groups that share a block
        (1, 1, 9, 2),
        (5, 5, 3, 1),
        (10, 2, 257, 10),  # tiles of rows of a group, and of columns
        (6, 3, 18, 18),
        (2, 1, 40, 49),
    ],
    ids=str,
)
def test_against_float64(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check(problem_of(*sizes, dtype))


@pytest.mark.parametrize("rank", range(1, 10))
def test_any_rank(rank: int) -> None:
    check(problem_of(9, 3, 15, rank, torch.float32))


@pytest.mark.parametrize("rank", [9, 10])
def test_nothing_yet(rank: int) -> None:
    first, root, gradient, rotation, keep, *scales = on_device(problem_of(5, 1, 33, rank, torch.float32))
    for tensor in (first, root, gradient):
        tensor[1:3] = 0
    direction, updated = run((first, root, gradient, rotation, keep, *scales[:2], 0.0))
    assert not direction[1:3].any()  # 0/0
    assert not updated[1:3].any()
    first[1:] = 1
    direction, _ = run((first, root, gradient, rotation, keep, *scales[:2], 0.0))
    assert not direction[1:3].any()  # x/0, as the definition has it
    assert direction[[0, 3, 4]].all()


@pytest.mark.parametrize("rank", [9, 10])
def test_a_nan_stays_in_its_row(rank: int) -> None:
    problem = on_device(problem_of(5, 1, 33, rank, torch.float32))
    problem[2][2, 0] = torch.nan
    for result in run(problem):
        assert result.isnan().any(1).tolist() == [False, False, True, False, False]


def test_small_and_large_gradients_in_float64() -> None:
    """Nothing on the way, the numbers of the call included, is rounded to float32."""
    first, root, gradient, rotation, _, *scales = problem_of(6, 2, 20, 5, torch.float64)
    gradient *= torch.logspace(-60, 60, 6, dtype=torch.float64)[:, None]
    gradient[0] = 1e-200  # no rotation
    got = run(on_device((first, root, gradient, rotation, 0.999, *scales)))[1].cpu()
    want = folded.update_root(root, gradient, 0.999)
    scale = want.abs().amax(1, keepdim=True)
    assert ((got - want).abs() <= 1e-14 * scale).all()


@pytest.mark.parametrize(("programs", "fewest"), [(1, 32), (10_000, 1), (10_000, 7)])
def test_chunks_of_columns(programs: int, fewest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from refconv_kernels.backends.triton import folded_adam as kernels

    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    monkeypatch.setattr(kernels, "_FEWEST_COLUMNS", fewest)
    check(problem_of(4, 2, 29, 9, torch.float32))


@pytest.mark.parametrize("rank", [4, 10])
def test_strided_arguments_and_two_runs_give_the_same_bits(rank: int) -> None:
    problem = on_device(problem_of(6, 2, 20, rank, torch.float32))
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in problem[:4]]
    results = run(problem), run(problem), run((*strided, *problem[4:]))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_no_rows_and_no_coordinates() -> None:
    for rows, rank in ((0, 3), (4, 0)):
        first, root = torch.empty(rows, rank, device=DEVICE), torch.empty(rows, folded.root_size(rank), device=DEVICE)
        rotation = torch.empty(1, rank, 18, device=DEVICE)
        direction, updated = run((first, root, first, rotation, 0.9, 1.0, 1.0, 0.1))
        assert (direction.shape, updated.shape) == (first.shape, root.shape)


@pytest.mark.parametrize("name", ["groupwise", "map_5", "rank_deficient"])
def test_the_optimizers_steps(name: str) -> None:
    layer = refocus(convolution(name), form="thin", **CASES[name][2]).to(DEVICE)
    other = copy.deepcopy(layer)
    optimizers = [FoldedAdamW(one.parameters(), one, lr=1e-2) for one in (layer, other)]
    for _ in range(2):
        gradient = torch.randn_like(layer.transform.weight)
        for one, optimizer, backend in zip((layer, other), optimizers, ("triton", "reference"), strict=True):
            one.transform.weight.grad = gradient.clone()
            with use_backend(backend):
                optimizer.step()
    torch.testing.assert_close(layer.transform.weight, other.transform.weight, rtol=0, atol=1e-13)


def test_limits_name_what_is_not_covered() -> None:
    first = torch.empty(4, 9, device=DEVICE)
    assert triton.folded_adam_limits(first) is None
    assert triton.folded_adam_limits(first.half()).startswith("first has dtype torch.float16, the kernel covers")
    assert (ops.choose("folded_adam", first) == "triton") is (DEVICE == "cuda")


_GUARDED = """
import torch
from refconv_kernels.backends.triton import folded_adam
from tests.guard import guarded
from tests.test_folded import problem_of
for sizes in ((7, 1, 17, 9), (67, 1, 6, 3), (6, 3, 18, 12), (2, 1, 257, 10)):
    *tensors, keep, first, second, eps = problem_of(*sizes, torch.float32)
    folded_adam.folded_adam(*map(guarded, tensors), keep, first, second, eps)
print("whole")
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="the guard pages are of main memory")
def test_nothing_beyond_the_inputs_is_read() -> None:
    done = subprocess.run([sys.executable, "-c", _GUARDED], capture_output=True, text=True)
    assert done.stdout.strip() == "whole", done.stderr[-2000:]
