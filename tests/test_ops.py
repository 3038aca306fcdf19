"""Operators of every backend against the reference in float64; schemas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from refconv_kernels import functional, ops, reference, use_backend
from refconv_kernels.schemas import SCHEMAS
from tests.cases import CASES, DEPTHWISE, SMALL, Case, cases
from tests.conftest import BACKENDS, needs_native
from tests.tolerances import assert_close

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KERNEL_DTYPES = [torch.float32, torch.float64]


def run(
    case: Case, tensors: list[Tensor | None], layout: torch.memory_format = torch.contiguous_format
) -> list[Tensor]:
    """Output and all gradients of ``refconv2d``, or of ``thin_refconv2d`` for one tensor more, for a fixed cotangent."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format) if t is not None else None for t in tensors]
    leaves[0] = leaves[0].contiguous(memory_format=layout)
    for leaf in leaves:
        if leaf is not None:
            leaf.requires_grad_()
    options = {k: v for k, v in case.options.items() if k != "bias"}
    function = functional.refconv2d if len(leaves) == 4 else functional.thin_refconv2d
    y = function(*leaves, **options)
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
    form: str = "full",
) -> None:
    weights = case.tensors() if form == "full" else case.thin_tensors()
    tensors = [t.to(device, dtype) if t is not None else None for t in (case.input(), *weights)]
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


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_thin_form_against_float64(case: Case, dtype: torch.dtype, layout: torch.memory_format) -> None:
    for backend in BACKENDS:
        check(case, backend, dtype, layout, form="thin")


@given(case=cases(wide=True), dtype=st.sampled_from(DTYPES))
def test_any_thin_problem(case: Case, dtype: torch.dtype) -> None:
    for backend in BACKENDS:
        check(case, backend, dtype, form="thin")


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


def operators(backend: str) -> list[str]:
    """Forward and backward operators that a backend has kernels for."""
    return [name for name in SCHEMAS if backend in ops.KERNELS[name.removesuffix("_backward")]]


def _samples(name: str, case: Case, own: bool = True) -> tuple[object, ...]:
    x, (basis, refocus, bias) = case.input(torch.float32), case.tensors(torch.float32)
    geometry = (list(case.stride), list(case.padding), list(case.dilation))
    if name == "folded_adam":
        first, root = torch.randn(len(refocus), 4), torch.rand(len(refocus), 10)
        return first, root, torch.randn_like(first), torch.randn(1, 4, 9 * case.groups), 0.9, 1.0, 1.0, 0.1
    if name == "refocus_weight":
        return basis, refocus, True
    if name == "fused_sgd":
        basis = torch.randn(4, 5, 3, 3)
        others = torch.randn(4, 5, 3, 3), torch.randn(20, 1, 3, 3), torch.randn(20, 1, 3, 3)
        return basis, *others, True, 0.1, 0.9, 0.0, 0.01, False, False, False
    if name == "refocus_weight_backward":
        return torch.randn_like(basis), basis, case.groups, case.map_size
    if name == "grouped_conv2d":
        return x, basis, bias, *geometry
    if name == "refconv2d":
        return x, basis, refocus, bias, True, *geometry, own
    _, coordinates, factor, _ = case.thin_tensors(torch.float32)
    if name == "thin_refocus_weight":
        return basis, coordinates, factor, True
    if name == "thin_refocus_weight_backward":
        return torch.randn_like(basis), factor
    if name == "thin_refconv2d":
        return x, basis, coordinates, factor, bias, True, *geometry, own
    grad = torch.randn_like(reference.conv2d(x, basis, bias, *geometry, case.groups))
    if name == "thin_refconv2d_backward":
        return grad, x, basis, coordinates, factor, False, *geometry, True, case.bias, True, False, own
    if name == "refconv2d_backward":
        sizes = (case.groups, case.map_size)
        return grad, x, torch.randn_like(basis), basis, *sizes, *geometry, True, False, True, case.bias, own
    return grad, x, basis, *geometry, True, case.bias, False


@needs_native
@pytest.mark.parametrize("name", operators("cpu"))
@pytest.mark.parametrize("case", [c for c in SMALL if not isinstance(c.padding, str)], ids=str)
def test_opcheck(name: str, case: Case) -> None:
    weights_only = name.removeprefix("thin_").startswith(("refocus", "fused_sgd"))
    if not weights_only and "depthwise" not in case.name:
        case = SMALL[0]
    op, samples = getattr(torch.ops.refconv_cpu, name).default, _samples(name, case)
    torch.library.opcheck(op, samples)
    if not weights_only:  # the layout of outputs follows the input's
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
            {i: t.cfloat() for i, t in enumerate((torch.randn(6, 1, 3, 3), torch.randn(6, 6, 3, 3)))},
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
        ("thin_refocus_weight", {1: torch.randn(6, 8)}, "coordinates must be"),
        ("thin_refocus_weight", {1: torch.randn(5, 9)}, "coordinates must be"),
        ("thin_refocus_weight", {2: torch.randn(1, 9, 8)}, "factor must be"),
        ("thin_refocus_weight", {2: torch.randn(4, 9, 9)}, "factor must be"),
        ("thin_refocus_weight", {2: torch.randn(1, 9, 9).double()}, "of one dtype"),
        ("thin_refocus_weight_backward", {0: torch.randn(6, 1, 3, 5)}, "factor must be"),
        ("thin_refconv2d", {1: torch.randn(5, 1, 3, 3)}, "coordinates must be"),
        ("thin_refconv2d_backward", {0: torch.randn(2, 6, 7, 8)}, "shape of the output"),
        # The same where the convolution is PyTorch's.
        ("refconv2d", {0: torch.randn(2, 7, 7, 9), 8: False}, "weight must be"),
        ("refconv2d", {3: torch.randn(5), 8: False}, "one element per output channel"),
        ("refconv2d_backward", {0: torch.randn(2, 6, 7, 8), 13: False}, "shape of the output"),
    ],
)
def test_raw_operators_refuse_what_would_leave_the_tensors(name: str, change: dict[int, object], message: str) -> None:
    args = list(_samples(name, DEPTHWISE[0]))
    for index, value in change.items():
        args[index] = value
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.refconv_cpu, name).default(*args)
