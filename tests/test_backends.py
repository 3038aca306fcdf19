"""The choice of backend."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import refconv_kernels
from refconv_kernels import functional, ops, use_backend
from refconv_kernels.autograd import native
from refconv_kernels.backends import cpu
from tests.cases import UNIT
from tests.conftest import BACKENDS, needs_native


def test_use_backend_nests_and_restores() -> None:
    assert refconv_kernels.current_backend() == "auto"
    with use_backend("reference"):
        assert refconv_kernels.current_backend() == "reference"
        with use_backend("auto"):
            assert refconv_kernels.current_backend() == "auto"
        assert refconv_kernels.current_backend() == "reference"
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert refconv_kernels.current_backend() == "auto"


def test_unknown_and_unavailable_backends_raise_and_say_why() -> None:
    with (
        pytest.raises(ValueError, match=r"name \(='gpu'\) must be one of \('auto', 'reference', 'cpu'"),
        use_backend("gpu"),
    ):
        pass
    with (
        pytest.raises(RuntimeError, match=r"name \(='cuda'\) cannot run here: no CUDA kernels"),
        use_backend("cuda"),
    ):
        pass
    assert refconv_kernels.current_backend() == "auto"


@needs_native
def test_a_named_backend_never_falls_back() -> None:
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3)
    with use_backend("cpu"):
        with pytest.raises(
            RuntimeError, match=r"'cpu' does not cover this grouped_conv2d: input has dtype torch.complex64"
        ):
            functional.conv2d(x.cfloat(), weight.cfloat(), groups=4)
        with pytest.raises(RuntimeError, match="basis has dtype torch.complex64"):
            functional.refocus_weight(weight.cfloat(), torch.zeros(4, 4, 3, 3).cfloat())
        with pytest.raises(RuntimeError, match="basis is on meta, the kernel runs on cpu"):
            functional.refocus_weight(weight.to("meta"), torch.zeros(4, 4, 3, 3, device="meta"))
        functional.conv2d(x, torch.randn(3, 4, 3, 3))  # no groups: PyTorch's own on every backend


@needs_native
def test_auto_takes_the_native_kernel_and_reference_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def limits(*problem: object) -> str | None:
        calls.append(problem)
        return None

    monkeypatch.setitem(
        ops.KERNELS["grouped_conv2d"],
        "cpu",
        ops.Kernel(lambda *a: calls.append("forward") or a[0].clone(), lambda *a: None, limits, lambda *_: None),
    )
    x, weight = torch.randn(1, 4, 12, 12), torch.randn(4, 1, 3, 3)
    functional.conv2d(x, weight, groups=4)
    assert calls[-1] == "forward"
    calls.clear()
    with use_backend("reference"):
        functional.conv2d(x, weight, groups=4)
    functional.conv2d(x, torch.randn(4, 4, 3, 3))
    assert calls == []


def test_grouped_limits_name_what_is_not_covered() -> None:
    x = torch.randn(1, 34, 5, 5)
    few = "groups (=1): the kernel is for grouped and depthwise convolutions"
    assert cpu.grouped_conv2d_limits(x, torch.randn(4, 34, 3, 3), 1, UNIT) == few
    many = "in_channels / groups (=17), the kernel covers at most 16"
    assert cpu.grouped_conv2d_limits(x, torch.randn(4, 17, 3, 3), 2, UNIT) == many
    assert cpu.grouped_conv2d_limits(x, torch.randn(34, 2, 3, 3), 17, UNIT) is None
    assert cpu.grouped_conv2d_limits(x, torch.randn(68, 1, 3, 3), 34, UNIT) is None
    assert cpu.grouped_conv2d_slower(x, torch.randn(34, 2, 3, 3), 17, UNIT) is None
    eight = "in_channels / groups (=8) is a multiple of 8: PyTorch's is faster"
    assert cpu.grouped_conv2d_slower(x, torch.randn(4, 8, 3, 3), 4, UNIT) == eight
    assert cpu.grouped_conv2d_slower(x.double(), torch.randn(4, 8, 3, 3).double(), 4, UNIT) is None
    last = torch.randn(2, 20, 5, 5).to(memory_format=torch.channels_last)
    five = "in_channels / groups (=5) in channels_last: PyTorch's is faster above 4"
    assert cpu.grouped_conv2d_slower(last, torch.randn(8, 5, 3, 3), 4, UNIT) == five
    assert cpu.grouped_conv2d_slower(last, torch.randn(5, 4, 3, 3), 5, UNIT) is None
    many = torch.randn(2, 56, 5, 5).to(memory_format=torch.channels_last)
    seven = "in_channels / groups (=7) in channels_last: PyTorch's is faster above 6"
    assert cpu.grouped_conv2d_slower(many, torch.randn(8, 7, 3, 3), 8, UNIT) == seven
    many = torch.randn(2, 48, 5, 5).to(memory_format=torch.channels_last)
    six = "in_channels / groups (=6) in channels_last: PyTorch's is faster above 4"
    assert cpu.grouped_conv2d_slower(many, torch.randn(8, 6, 3, 3), 8, UNIT) is None
    assert cpu.grouped_conv2d_slower(many, torch.randn(8, 6, 2, 2), 8, UNIT) == six
    assert cpu.grouped_conv2d_slower(many.bfloat16(), torch.randn(8, 6, 3, 3).bfloat16(), 8, UNIT) == six
    assert cpu.grouped_conv2d_slower(last, torch.randn(40, 1, 3, 3), 20, UNIT) is None
    with use_backend("cpu"):  # grouped, but not covered: PyTorch's on every backend
        assert functional.conv2d(x, torch.randn(4, 17, 3, 3), groups=2).shape == (1, 4, 3, 3)


@needs_native
def test_auto_leaves_to_pytorch_what_pytorch_does_faster() -> None:
    def dense(channels: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        basis = torch.empty(channels, channels, size, size, dtype=dtype)
        return basis, torch.empty(channels**2, 1, 3, 3, dtype=dtype)

    groupwise = torch.empty(512, 4, 3, 3), torch.empty(2048, 2, 3, 3)
    assert ops.choose("refocus_weight", *groupwise) == "reference"
    assert ops.choose("refocus_weight", *dense(64, 5)) == "reference"
    assert ops.choose("refocus_weight", *dense(64, 5, torch.float64)) == "cpu"
    assert ops.choose("refocus_weight", *dense(4, 5)) == "cpu"
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert ops.choose("refocus_weight", *dense(4, 3, dtype)) == "cpu"
    assert ops.choose("refocus_weight", torch.empty(8, 1, 3, 3), torch.empty(8, 8, 3, 3)) == "cpu"
    with use_backend("cpu"):
        assert ops.choose("refocus_weight", *groupwise) == "cpu"  # asked for by name
    kernel = ops.KERNELS["refocus_weight"]["cpu"]
    assert kernel.slower(*groupwise) == "refocus groups of 2 kernels, 331776 multiply-adds: PyTorch's is faster"
    x = torch.empty(1, 4, 7, 7)
    assert ops.choose("grouped_conv2d", x, torch.empty(4, 1, 3, 3), 4, UNIT) == "cpu"
    # Both steps are one call where the transformation is ours, whosever convolution it is.
    octets = torch.empty(16, 8, 3, 3), torch.empty(128, 2, 3, 3)
    assert ops.choose("refconv2d", torch.empty(1, 16, 7, 7), *octets, 2, UNIT) == "cpu"
    assert ops.choose("refconv2d", torch.empty(1, 8, 7, 7), *groupwise, 2, UNIT) == "reference"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("reference", "reference"),
        ("", "auto"),
        ("nonsense", "ValueError: REFCONV_BACKEND (='nonsense') must be one of"),
    ],
)
def test_environment_variable(value: str, expected: str) -> None:
    code = "import refconv_kernels; print(refconv_kernels.current_backend())"
    env = {**os.environ, "REFCONV_BACKEND": value}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert expected in done.stdout + done.stderr


def test_backward_uses_the_backend_of_the_forward() -> None:
    x, weight = torch.randn(1, 4, 12, 12, requires_grad=True), torch.randn(4, 1, 3, 3)
    y = functional.conv2d(x, weight, groups=4)
    with use_backend("reference"):
        name = y.grad_fn.name()
        assert ("ConvolutionBackward" in name) == ("cpu" not in BACKENDS), name
        y.sum().backward()
    assert x.grad is not None


class TestRecall:
    """What was chosen for a problem before, and when that does not count."""

    @pytest.fixture(autouse=True)
    def _nothing_chosen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ops, "_chosen", {})

    def test_only_auto_recalls(self) -> None:
        ops.remember(("problem", 1), "cpu")
        assert ops.recall(("problem", 1)) == "cpu"
        assert ops.recall(("problem", 2)) is None
        with use_backend("reference"):
            assert ops.recall(("problem", 1)) is None
            ops.remember(("problem", 2), "reference")
        assert ops.recall(("problem", 2)) is None
        with forward_ad.dual_level():
            assert ops.recall(("problem", 1)) is None
        assert ops.recall(("problem", 1)) == "cpu"

    def test_it_does_not_grow_without_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ops, "_MOST_CHOSEN", 10)
        for problem in range(25):
            ops.remember(problem, "cpu")
            assert len(ops._chosen) <= 10
            assert ops.recall(problem) == "cpu"

    @needs_native
    def test_a_problem_seen_before_is_not_looked_at_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        looked: list[str] = []
        choose = ops.choose
        monkeypatch.setattr(native, "_native", None)  # it remembers by itself
        for module in (functional.layers, functional.weights):
            monkeypatch.setattr(module, "choose", lambda name, *a, **k: looked.append(name) or choose(name, *a, **k))
        x, basis = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3)
        refocus = torch.randn(4, 4, 3, 3)
        results = [functional.refconv2d(x, basis, refocus, None, (1, 1), (1, 1), (1, 1), 4) for _ in range(3)]
        assert looked == ["refconv2d", "grouped_conv2d"]
        weights = [functional.refocus_weight(basis, refocus) for _ in range(3)]
        assert looked == ["refconv2d", "grouped_conv2d", "refocus_weight"]
        assert all(torch.equal(results[0], other) for other in results)
        assert all(torch.equal(weights[0], other) for other in weights)

    def test_another_problem_of_the_same_sizes(self) -> None:
        x, basis, refocus = torch.randn(2, 4, 5, 5), torch.randn(4, 1, 3, 3), torch.randn(4, 4, 3, 3)
        geometry = (1, 1), (1, 1), (1, 1), 4
        for dtype in (torch.float32, torch.float64):
            functional.refconv2d(*(t.to(dtype) for t in (x, basis, refocus)), None, *geometry)
            functional.refocus_weight(basis.to(dtype), refocus.to(dtype))
        with pytest.raises(TypeError, match="refocus.dtype"):
            functional.refocus_weight(basis, refocus.double())
        with pytest.raises(TypeError, match="refocus.dtype"):
            functional.refconv2d(x, basis, refocus.double(), None, *geometry)
        with pytest.raises(TypeError, match="bias.dtype"):
            functional.refconv2d(x, basis, refocus, torch.zeros(4).double(), *geometry)
        with pytest.raises(ValueError, match="groups"):
            functional.refconv2d(x, basis, refocus, None, (1, 1), (1, 1), (1, 1), 2)
        for layout in (torch.contiguous_format, torch.channels_last):
            y = functional.refconv2d(x.contiguous(memory_format=layout), basis, refocus, None, *geometry)
            assert y.is_contiguous(memory_format=layout)
        with torch.autocast("cpu", torch.bfloat16):
            assert functional.refconv2d(x, basis, refocus, None, *geometry).dtype == torch.bfloat16
        batched = torch.func.vmap(lambda x: functional.refconv2d(x, basis, refocus, None, *geometry))(x[None])
        torch.testing.assert_close(batched[0], functional.refconv2d(x, basis, refocus, None, *geometry))
