"""The native kernels: instruction sets, threads, and both steps in one call."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional as F

from refconv_kernels import functional, reference, use_backend
from refconv_kernels.autograd import native
from refconv_kernels.backends import cpu
from tests.cases import CASES, DEPTHWISE, Case
from tests.conftest import needs_native
from tests.test_ops import check, run


@pytest.fixture
def _isa() -> Iterator[None]:
    yield
    cpu.native.set_instruction_set("auto")


@needs_native
@pytest.mark.usefixtures("_isa", "poisoned")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set(case: Case) -> None:
    assert cpu.native.instruction_sets()[-1] == "portable"
    for name in cpu.native.instruction_sets():
        cpu.native.set_instruction_set(name)
        assert cpu.native.instruction_set() == name
        check(case, "cpu", torch.float32)
        check(case, "cpu", torch.float32, form="thin")
        if case.in_channels == case.out_channels == case.groups:
            check(case, "cpu", torch.float32, torch.channels_last)


@needs_native
@pytest.mark.usefixtures("_isa")
def test_rows_take_the_instruction_set_whose_vectors_take_the_least_time() -> None:
    best, choose = cpu.native.instruction_set(), cpu.native.instruction_set_for_rows
    if "avx512" in cpu.native.instruction_sets():
        half = "avx512vl"
        wide = half if cpu.native.has_half_width_units() else best  # 2 or 4 of 64 bytes, 3 or 7 of 32
        widths = (7, 8, 9, 16, 24, 56, 112)
        assert [choose(width, 4) for width in widths] == [half, half, best, best, wide, wide, best]
        assert [choose(width, 8) for width in (12, 28)] == [wide, wide]
        assert [choose(width, 8) for width in (3, 4, 5, 8)] == [half, half, best, best]
    cpu.native.set_instruction_set("portable")
    assert choose(7, 4) == "portable"
    cpu.native.set_instruction_set("auto")
    assert cpu.native.instruction_set() == best


@needs_native
def test_unknown_instruction_set() -> None:
    with pytest.raises(
        ValueError, match=r"instruction set \(='mmx'\) must be auto or one that this machine runs: .*portable"
    ):
        cpu.native.set_instruction_set("mmx")
    code = "from refconv_kernels.backends import cpu; print(cpu.native.instruction_set())"
    for name in cpu.native.instruction_sets():
        env = {**os.environ, "REFCONV_CPU_ISA": name}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == name


@needs_native
def test_build_info() -> None:
    info = cpu.native.build_info()
    assert info["torch_abi_target"] == "2.11"
    assert info["build_type"] == "Release"
    assert info["compiler"]
    assert info["torch_headers"]


def require_same_for_any_threads(compute: Callable[[], list[torch.Tensor]]) -> None:
    """The same bits for 1, 2, 3 and 7 threads."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(compute())
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@needs_native
@pytest.mark.parametrize("case", [Case("many_planes", 23, 23, (3, 3), 23, batch=5), *DEPTHWISE[:3]], ids=str)
def test_results_do_not_depend_on_threads(case: Case) -> None:
    x = case.input(torch.float32)
    full, thin = case.tensors(torch.float32), case.thin_tensors(torch.float32)

    def results() -> list[torch.Tensor]:
        with use_backend("cpu"):
            return run(case, [x, *full]) + run(case, [x, *thin])

    require_same_for_any_threads(results)


@needs_native
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("kernel", "stride", "per_group", "size"),
    [
        (3, 1, 1, (5, 23, 19, 40)),
        (3, 2, 1, (5, 23, 19, 40)),
        (3, 1, 1, (5, 23, 7, 7)),
        (3, 2, 1, (5, 23, 14, 14)),
        (3, 1, 1, (5, 23, 5, 4)),
        (5, 1, 1, (5, 23, 9, 8)),
        (3, 1, 1, (5, 48, 65, 68)),  # in channels_last large enough for tiles of two rows, which threads may part
        (3, 2, 1, (5, 48, 83, 72)),
        (5, 1, 1, (2, 200, 9, 8)),  # in channels_last so few pixels that threads part the channels
        (3, 1, 3, (2, 195, 9, 8)),
        (9, 1, 4, (30, 204, 11, 12)),  # in channels_last so many weights that the channels are parted
    ],
)
def test_convolutions_do_not_depend_on_threads(
    kernel: int, stride: int, per_group: int, size: tuple[int, int, int, int], layout: torch.memory_format
) -> None:
    x, weight = torch.randn(size).contiguous(memory_format=layout), torch.randn(size[1], per_group, kernel, kernel)
    pairs = [[s, s] for s in (stride, kernel // 2, 1)]
    ops = torch.ops.refconv_cpu
    dy = ops.grouped_conv2d(x, weight, None, *pairs)

    def results() -> list[torch.Tensor]:
        y = ops.grouped_conv2d(x, weight, None, *pairs)
        return [y, *ops.grouped_conv2d_backward(dy, x, weight, *pairs, True, True, True)]

    require_same_for_any_threads(results)


@needs_native
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [((5, 7), 1, 0), ((5, 7), 1, 1), ((9, 40), 1, 1), ((24, 24), 2, 1), ((5, 14), 2, 1), ((9, 70), 1, 0)],
)
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_infinity_reaches_only_the_taps_that_see_it(
    dtype: torch.dtype,
    kernel: int,
    size: tuple[int, int],
    stride: int,
    padding: int,
    layout: torch.memory_format,
) -> None:
    """0 * infinity must not leak from padding, or from vector lanes past the end of a row."""
    x, weight = torch.randn(1, 2, *size).to(dtype), torch.randn(2, 1, kernel, kernel).to(dtype)
    x[0, 0, 2, -1] = x[0, 0, 0, 5] = float("inf")
    out = F.conv2d(x, weight, stride=stride, padding=padding, groups=2)
    dy, pairs = torch.ones_like(out), [[s, s] for s in (stride, padding, 1)]
    op = torch.ops.refconv_cpu.grouped_conv2d_backward.default
    got = op(*(t.contiguous(memory_format=layout) for t in (dy, x)), weight, *pairs, False, True, False)[1]
    want = reference.conv2d_backward(dy, x, weight, *((s, s) for s in (stride, padding, 1)), 2, (False, True, False))[1]
    assert want.isinf().any()
    assert torch.equal(got.isinf(), want.isinf())
    assert not got.isnan().any()


@needs_native
@pytest.mark.usefixtures("_isa")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("kernel", [3, 5, 7, 9])
def test_sums_over_large_maps_stay_accurate(kernel: int, layout: torch.memory_format) -> None:
    """Equal terms round the same way every time: 3136 of them in one float32 would be 4e-5 off."""
    channels, size = 16, 56
    x, weight = torch.ones(1, channels, size, size), torch.zeros(channels, 1, kernel, kernel)
    dy = torch.linspace(0.1, 1.9, channels).reshape(1, -1, 1, 1).expand(x.shape)
    pairs = [(s, s) for s in (1, kernel // 2, 1)]
    op = torch.ops.refconv_cpu.grouped_conv2d_backward.default
    got = op(*(t.contiguous(memory_format=layout) for t in (dy, x)), weight, *map(list, pairs), False, True, True)[1:]
    doubles = (t.double() for t in (dy, x, weight))
    want = reference.conv2d_backward(*doubles, *pairs, channels, (False, True, True))[1:]
    for gradient, exact in zip(got, want, strict=True):
        torch.testing.assert_close(gradient.double(), exact, rtol=1.5e-5, atol=0)


@needs_native
@pytest.mark.usefixtures("_isa")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_and_written(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Infinities, NaN of every kind and subnormal numbers too; the lengths of rows straddle the vectors."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    for width in (7, 8, 31, 64):
        rows = -(-65536 // (4 * width))
        x = torch.zeros(4 * rows * width, dtype=dtype)
        x[:65536] = every
        x = x.view(1, 4, rows, width).contiguous(memory_format=layout)
        for name in cpu.native.instruction_sets():
            cpu.native.set_instruction_set(name)
            y = torch.ops.refconv_cpu.grouped_conv2d(
                x, torch.ones(4, 1, 1, 1, dtype=dtype), None, [1, 1], [0, 0], [1, 1]
            )
            assert torch.equal(y.isnan(), x.isnan())
            assert torch.equal(y.nan_to_num(0, 7, -7), x.nan_to_num(0, 7, -7))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_one_call_gives_what_the_two_steps_give(
    layout: torch.memory_format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_native", None)  # whose nodes have no names
    x = torch.randn(2, 8, 9, 19, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    basis, bias = torch.randn(8, 1, 3, 3, dtype=dtype), torch.randn(8, dtype=dtype)
    refocus = torch.randn(8, 8, 3, 3, dtype=dtype, requires_grad=True)
    problem = {"stride": (2, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 8}
    one = functional.refconv2d(x, basis, refocus, bias, **problem)
    two = functional.conv2d(x, functional.refocus_weight(basis, refocus), bias, **problem)
    assert type(one.grad_fn).__name__ == "RefConv2dBackward"
    assert torch.equal(one, two)
    grad = torch.randn_like(one)
    for a, b in zip(*(torch.autograd.grad(y, [x, refocus], grad) for y in (one, two)), strict=True):
        assert torch.equal(a, b)


@needs_native
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("width", "stride"), [(256, 1), (250, 2), (8, 1)])
def test_outputs_written_around_the_cache(width: int, stride: int, layout: torch.memory_format) -> None:
    """From 16 MB on; narrower ones are every other test."""
    case = Case("large", 32, 32, (3, 3), 32, stride=(stride, stride), height=73728 // width, width=width)
    assert case.input(torch.float32).nbytes >= 16 << 20
    check(case, "cpu", torch.float32, layout)


@needs_native
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_one_call_of_the_thin_form_gives_what_the_two_steps_give(
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_native", None)
    x = torch.randn(2, 8, 9, 9).contiguous(memory_format=layout).requires_grad_()
    basis, coordinates, bias = torch.randn(8, 1, 3, 3), torch.randn(8, 9, requires_grad=True), torch.randn(8)
    factor = functional.refocus_factor(basis, 8)
    problem = {"stride": (2, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 8}
    one = functional.thin_refconv2d(x, basis, coordinates, factor, bias, **problem)
    two = functional.conv2d(x, functional.thin_refocus_weight(basis, coordinates, factor), bias, **problem)
    assert type(one.grad_fn).__name__ == "ThinRefConv2dBackward"
    assert torch.equal(one, two)
    grad = torch.randn_like(one)
    for a, b in zip(*(torch.autograd.grad(y, [x, coordinates], grad) for y in (one, two)), strict=True):
        assert torch.equal(a, b)
