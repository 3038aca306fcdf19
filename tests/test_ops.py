"""Operators of every backend against the reference in float64; schemas; the choice of backend."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import refconv_kernels
from refconv_kernels import functional, ops, reference, use_backend
from refconv_kernels.backends import cpu
from refconv_kernels.schemas import SCHEMAS
from tests.cases import CASES, DEPTHWISE, SMALL, Case, cases
from tests.conftest import BACKENDS, needs_native
from tests.tolerances import assert_close

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KERNEL_DTYPES = [torch.float32, torch.float64]


def run(
    case: Case, tensors: list[Tensor | None], layout: torch.memory_format = torch.contiguous_format
) -> list[Tensor]:
    """Output and all gradients of ``refconv2d``, for a fixed cotangent."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format) if t is not None else None for t in tensors]
    leaves[0] = leaves[0].contiguous(memory_format=layout)
    for leaf in leaves:
        if leaf is not None:
            leaf.requires_grad_()
    x, basis, refocus, bias = leaves
    options = {k: v for k, v in case.options.items() if k != "bias"}
    y = functional.refconv2d(x, basis, refocus, bias, **options)
    ramp = torch.linspace(-1, 1, max(1, y.numel()), dtype=torch.float64, device=y.device)[: y.numel()].view(y.shape)
    grads = torch.autograd.grad(y, [t for t in leaves if t is not None], ramp.to(y.dtype))
    return [y.detach(), *grads]


def layout_of(tensor: Tensor) -> list[int]:
    """Strides of the dimensions that have any."""
    return (
        [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
        if tensor.numel()
        else []
    )


def check(
    case: Case,
    backend: str,
    dtype: torch.dtype,
    layout: torch.memory_format = torch.contiguous_format,
    device: str = "cpu",
) -> None:
    tensors = [t.to(device, dtype) if t is not None else None for t in (case.input(), *case.tensors())]
    with use_backend("reference"):
        want = run(case, [t.double() if t is not None else None for t in tensors])
        formula = run(case, tensors, layout)
    with use_backend(backend):
        got = run(case, tensors, layout)
    assert layout_of(got[0]) == layout_of(formula[0])  # y
    assert layout_of(got[1]) == layout_of(formula[1])  # dx
    for ours, theirs, exact in zip(got, formula, want, strict=True):
        assert ours.dtype == dtype
        if dtype in KERNEL_DTYPES:
            assert_close(ours, exact, case.reduction)
        elif exact.numel():  # halves: at most twice the error of PyTorch's own formula in the same precision
            bound = 2 * (theirs.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
            assert (ours.double() - exact).abs().max() <= bound


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_auto_against_float64(case: Case, dtype: torch.dtype, layout: torch.memory_format) -> None:
    check(case, "auto", dtype, layout)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_backend_against_float64(case: Case, dtype: torch.dtype, backend: str) -> None:
    check(case, backend, dtype)


@settings(max_examples=300)
@given(
    case=cases(wide=True),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_any_grouped_problem(case: Case, dtype: torch.dtype, layout: torch.memory_format) -> None:
    for backend in BACKENDS:
        check(case, backend, dtype, layout)


@given(case=cases(), dtype=st.sampled_from(KERNEL_DTYPES))
def test_any_problem(case: Case, dtype: torch.dtype) -> None:
    for backend in BACKENDS:
        check(case, backend, dtype)


@pytest.mark.parametrize("case", [c for c in CASES if c.batch], ids=str)
def test_strided_input_and_weights(case: Case, backend: str) -> None:
    """Slices of larger tensors give what their copies give."""
    x, (basis, refocus, bias) = case.input(torch.float32), case.tensors(torch.float32)
    options = {k: v for k, v in case.options.items() if k != "bias"}
    big = torch.randn(case.batch, case.in_channels + 2, case.height, 2 * case.width)
    big[:, 1:-1, :, ::2] = x
    basis_t = basis.transpose(2, 3).contiguous().transpose(2, 3)
    refocus_t = torch.stack((refocus, refocus), -1)[..., 0]
    with use_backend(backend):
        want = functional.refconv2d(x, basis, refocus, bias, **options)
        got = functional.refconv2d(big[:, 1:-1, :, ::2], basis_t, refocus_t, bias, **options)
    torch.testing.assert_close(got, want)


# --- the native kernels -------------------------------------------------------------------------------------


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
        if case.in_channels == case.out_channels == case.groups:
            check(case, "cpu", torch.float32, torch.channels_last)


@needs_native
@pytest.mark.usefixtures("_isa")
def test_rows_take_the_instruction_set_whose_vectors_they_fill_best() -> None:
    best, choose = cpu.native.instruction_set(), cpu.native.instruction_set_for_rows
    if "avx512" in cpu.native.instruction_sets():
        half = "avx512vl"
        assert [choose(width, 4) for width in (7, 8, 9, 16, 56, 112)] == [half, half, best, best, half, best]
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


@needs_native
@pytest.mark.parametrize("case", [Case("many_planes", 23, 23, (3, 3), 23, batch=5), *DEPTHWISE[:3]], ids=str)
def test_results_do_not_depend_on_threads(case: Case) -> None:
    case_tensors = [case.input(torch.float32), *case.tensors(torch.float32)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            with use_backend("cpu"):
                results.append(run(case, case_tensors))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@needs_native
def test_infinity_reaches_only_the_taps_that_see_it() -> None:
    """0 * infinity must not leak from vector lanes past the end of a row."""
    x, weight = torch.randn(1, 1, 5, 7), torch.randn(1, 1, 3, 3)
    x[0, 0, 2, 6] = float("inf")
    op = torch.ops.refconv_cpu.grouped_conv2d_backward.default
    got = op(torch.ones(1, 1, 3, 5), x, weight, [1, 1], [0, 0], [1, 1], False, True, False)[1]
    want = reference.conv2d_backward(
        torch.ones(1, 1, 3, 5), x, weight, (1, 1), (0, 0), (1, 1), 1, (False, True, False)
    )[1]
    assert torch.equal(got.isinf(), want.isinf())
    assert not got.isnan().any()


def _samples(name: str, case: Case) -> tuple[object, ...]:
    x, (basis, refocus, bias) = case.input(torch.float32), case.tensors(torch.float32)
    geometry = (list(case.stride), list(case.padding), list(case.dilation))
    factor = functional.refocus_factor(basis, case.groups, case.map_size)
    thin = (basis, torch.randn(refocus.shape[0], factor.shape[1]), factor)
    if name == "thin_refocus_weight":
        return *thin, True
    if name == "thin_refocus_weight_backward":
        return torch.randn_like(basis), factor
    if name == "thin_refconv2d":
        return x, *thin, bias, True, *geometry
    if name == "refocus_weight":
        return basis, refocus, True
    if name == "refocus_weight_backward":
        return torch.randn_like(basis), basis, case.groups, case.map_size
    if name == "grouped_conv2d":
        return x, basis, bias, *geometry
    if name == "refconv2d":
        return x, basis, refocus, bias, True, *geometry
    grad = torch.randn_like(reference.conv2d(x, basis, bias, *geometry, case.groups))
    if name == "refconv2d_backward":
        sizes = (case.groups, case.map_size)
        return grad, x, torch.randn_like(basis), basis, *sizes, *geometry, True, False, True, case.bias
    if name == "thin_refconv2d_backward":
        return grad, x, *thin, True, *geometry, True, False, True, case.bias
    return grad, x, basis, *geometry, True, case.bias, False


@needs_native
@pytest.mark.parametrize("name", list(SCHEMAS))
@pytest.mark.parametrize("case", [c for c in SMALL if not isinstance(c.padding, str)], ids=str)
def test_opcheck(name: str, case: Case) -> None:
    if not name.startswith("refocus") and "depthwise" not in case.name:
        case = SMALL[0]
    op, samples = getattr(torch.ops.refconv_cpu, name).default, _samples(name, case)
    torch.library.opcheck(op, samples)
    if not name.startswith("refocus"):  # the layout of outputs follows the input's
        torch.library.opcheck(op, tuple(_channels_last(a) for a in samples))


def _channels_last(argument: object) -> object:
    """Feature maps in the other memory format, everything else as it is."""
    is_map = isinstance(argument, Tensor) and argument.dim() == 4 and argument.shape[1] > 1
    return argument.contiguous(memory_format=torch.channels_last) if is_map else argument


@needs_native
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "grouped_conv2d",
            {2: None, **{i: t.cfloat() for i, t in enumerate((torch.randn(2, 6, 7, 9), torch.randn(6, 1, 3, 3)))}},
            "dtype must be float32 or float64",
        ),
        (
            "refocus_weight",
            {i: t.half() for i, t in enumerate((torch.randn(6, 1, 3, 3), torch.randn(6, 6, 3, 3)))},
            "dtype must be float32 or float64",
        ),
        ("refconv2d", {2: torch.randn(6, 4, 3, 3)}, "must divide"),
        ("refconv2d_backward", {0: torch.randn(2, 6, 7, 8)}, "shape of the output"),
        ("grouped_conv2d", {0: torch.randn(6, 7, 9)}, "number of dimensions"),
        ("grouped_conv2d", {1: torch.randn(6, 1, 3, 3).double()}, "of one dtype"),
        ("grouped_conv2d", {1: torch.randn(7, 1, 3, 3)}, "weight must be"),
        ("grouped_conv2d", {1: torch.randn(6, 1, 30, 3)}, "must fit into the padded input"),
        ("grouped_conv2d", {2: torch.randn(5)}, "one element per output channel"),
        ("grouped_conv2d", {3: [0, 1]}, "must be positive"),
        ("grouped_conv2d_backward", {0: torch.randn(2, 6, 7, 8)}, "shape of the output"),
        ("refocus_weight", {1: torch.randn(6, 4, 3, 3)}, "must divide"),
        ("refocus_weight", {1: torch.randn(6, 6, 2, 2)}, "must be odd"),
        ("refocus_weight", {1: torch.randn(6, 6, 3, 5)}, "map_size, map_size"),
        ("refocus_weight_backward", {0: torch.randn(5, 1, 3, 3)}, "shape of basis"),
    ],
)
def test_raw_operators_refuse_what_would_leave_the_tensors(name: str, change: dict[int, object], message: str) -> None:
    args = list(_samples(name, DEPTHWISE[0]))
    for index, value in change.items():
        args[index] = value
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.refconv_cpu, name).default(*args)


# --- choice of backend --------------------------------------------------------------------------------------


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
    assert cpu.grouped_conv2d_limits(x, torch.randn(4, 34, 3, 3), 1, 3) == few
    many = "in_channels / groups (=17), the kernel covers at most 16"
    assert cpu.grouped_conv2d_limits(x, torch.randn(4, 17, 3, 3), 2, 3) == many
    assert cpu.grouped_conv2d_limits(x, torch.randn(34, 2, 3, 3), 17, 3) is None
    assert cpu.grouped_conv2d_limits(x, torch.randn(68, 1, 3, 3), 34, 3) is None
    assert cpu.grouped_conv2d_slower(x, torch.randn(34, 2, 3, 3), 17, 3) is None
    eight = "in_channels / groups (=8) is a multiple of 8: PyTorch's is faster"
    assert cpu.grouped_conv2d_slower(x, torch.randn(4, 8, 3, 3), 4, 3) == eight
    assert cpu.grouped_conv2d_slower(x.double(), torch.randn(4, 8, 3, 3).double(), 4, 3) is None
    copied = "channels_last would be copied to NCHW and back: PyTorch's is faster"
    last = torch.randn(2, 34, 5, 5).to(memory_format=torch.channels_last)
    assert cpu.grouped_conv2d_slower(last, torch.randn(34, 2, 3, 3), 17, 5) == copied
    assert cpu.grouped_conv2d_slower(last, torch.randn(68, 1, 3, 3), 34, 5) is None
    halves = last.bfloat16(), torch.randn(34, 1, 3, 3).bfloat16(), 34
    assert cpu.grouped_conv2d_slower(*halves, 5) == "bfloat16, channels_last, rows of 5: PyTorch's is faster"
    assert cpu.grouped_conv2d_slower(*halves, 3) is None
    with use_backend("cpu"):  # grouped, but not covered: PyTorch's on every backend
        assert functional.conv2d(x, torch.randn(4, 17, 3, 3), groups=2).shape == (1, 4, 3, 3)


@needs_native
def test_auto_leaves_to_pytorch_what_pytorch_does_faster() -> None:
    def dense(channels: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        basis = torch.empty(channels, channels, size, size, dtype=dtype)
        return basis, torch.empty(channels**2, 1, 3, 3, dtype=dtype)

    groupwise = torch.empty(8, 4, 3, 3), torch.empty(32, 2, 3, 3)
    assert ops.choose("refocus_weight", *groupwise) == "reference"
    assert ops.choose("refocus_weight", *dense(4, 5)) == "reference"
    assert ops.choose("refocus_weight", *dense(4, 3, torch.float64)) == "reference"
    if cpu.native.instruction_set() == "avx512":
        assert ops.choose("refocus_weight", *dense(4, 3)) == "cpu"
    assert ops.choose("refocus_weight", torch.empty(8, 1, 3, 3), torch.empty(8, 8, 3, 3)) == "cpu"
    with use_backend("cpu"):
        assert ops.choose("refocus_weight", *groupwise) == "cpu"  # asked for by name
    kernel = ops.KERNELS["refocus_weight"]["cpu"]
    assert kernel.slower(*groupwise) == "refocus groups of 2 kernels: PyTorch's is faster"
    x = torch.empty(1, 4, 7, 7)
    assert ops.choose("grouped_conv2d", x, torch.empty(4, 1, 3, 3), 4, 7) == "cpu"
    # Both steps in one call where both are ours, one by one where one is not.
    assert (
        ops.choose("refconv2d", torch.empty(1, 8, 7, 7), torch.empty(8, 1, 3, 3), torch.empty(8, 8, 3, 3), 8, 7)
        == "cpu"
    )
    assert ops.choose("refconv2d", x, torch.empty(4, 1, 3, 3), torch.empty(4, 4, 3, 3), 4, 7) == "reference"


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
        assert ("GroupedConv2d" in name) == ("cpu" in BACKENDS)
        y.sum().backward()
    assert x.grad is not None


@needs_native
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_one_call_gives_what_the_two_steps_give(layout: torch.memory_format) -> None:
    x = torch.randn(2, 8, 9, 9).contiguous(memory_format=layout).requires_grad_()
    basis, refocus, bias = torch.randn(8, 1, 3, 3), torch.randn(8, 8, 3, 3, requires_grad=True), torch.randn(8)
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
@pytest.mark.parametrize(("width", "stride"), [(256, 1), (250, 2)])
def test_outputs_written_around_the_cache(width: int, stride: int, layout: torch.memory_format) -> None:
    """From 16 MB on; narrower ones are every other test."""
    case = Case("large", 32, 32, (3, 3), 32, stride=(stride, stride), height=288, width=width)
    assert case.input(torch.float32).nbytes >= 16 << 20
    check(case, "cpu", torch.float32, layout)
