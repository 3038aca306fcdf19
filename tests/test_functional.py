"""Arguments, types, layouts and errors of the stateless functions."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from refconv_kernels import functional, use_backend
from tests.cases import CASES, Case

X, W, B = torch.randn(2, 4, 6, 6), torch.randn(8, 2, 3, 3), torch.randn(8)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv2d_is_nn_conv2d(case: Case, backend: str) -> None:
    conv = torch.nn.Conv2d(*case.args, **case.options)
    x = case.input(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that an even "same" copies the input
        want = conv(x)
    options = {k: v for k, v in case.options.items() if k != "bias"}
    with use_backend(backend):
        got = functional.conv2d(x, conv.weight, conv.bias, **options)
    torch.testing.assert_close(got, want)
    assert backend != "reference" or torch.equal(got, want)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_unbatched_input(groups: int, backend: str) -> None:
    weight = torch.randn(4, 4 // groups, 3, 3)
    with use_backend(backend):
        want = functional.conv2d(X, weight, None, padding=1, groups=groups)
        got = functional.conv2d(X[0], weight, None, padding=1, groups=groups)
        for mode in ("reflect", "circular"):
            assert functional.conv2d(X[0], weight, None, 1, 1, groups=groups, padding_mode=mode).shape == got.shape
    torch.testing.assert_close(got, want[0])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_takes_the_reference_path(dtype: torch.dtype) -> None:
    x, basis = torch.randn(2, 3, 5, 5, dtype=dtype), torch.randn(3, 1, 3, 3, dtype=dtype)
    refocus = torch.randn(3, 3, 3, 3, dtype=dtype)
    got = functional.refconv2d(x, basis, refocus, padding=1, groups=3)
    weight = basis + F.conv2d(basis.view(1, 3, 3, 3), refocus, padding=1).view(3, 1, 3, 3)
    torch.testing.assert_close(got, F.conv2d(x, weight, padding=1, groups=3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_combined_in_float32_and_rounded_once(dtype: torch.dtype, backend: str) -> None:
    basis, refocus = torch.randn(16, 1, 3, 3).to(dtype), torch.randn(16, 16, 3, 3).to(dtype)
    with use_backend(backend):
        got = functional.refocus_weight(basis, refocus)
        want = functional.refocus_weight(basis.float(), refocus.float()).to(dtype)
    assert got.dtype == dtype
    assert torch.equal(got, want)


def test_autocast_computes_the_transformation_in_float32() -> None:
    basis, refocus = torch.randn(16, 1, 3, 3), torch.randn(16, 16, 3, 3)
    x = torch.randn(2, 16, 6, 6)
    want = functional.refocus_weight(basis, refocus)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(functional.refocus_weight(basis, refocus), want)
        y = functional.refconv2d(x, basis, refocus, groups=16)
        plain = F.conv2d(x, want, groups=16)
        mixed = functional.conv2d(x.bfloat16(), want, torch.zeros(16), groups=16)  # as after another layer
        double = functional.conv2d(x.double(), want.double(), groups=16)
    assert y.dtype == mixed.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(mixed, plain)


def test_gradients_through_autocast_have_the_parameters_dtype() -> None:
    basis, refocus = torch.randn(4, 1, 3, 3), torch.randn(4, 4, 3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        functional.refconv2d(X, basis, refocus, groups=4).float().sum().backward()
    assert refocus.grad.dtype == torch.float32
    assert refocus.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (8, 1, 3, 3), (8, 4, 5, 3)])
def test_transformed_weight_keeps_the_memory_format(shape: tuple[int, ...], backend: str) -> None:
    basis = torch.randn(shape).to(memory_format=torch.channels_last)
    refocus = torch.randn(shape[0] * shape[1], 1, 3, 3)
    with use_backend(backend):
        got = functional.refocus_weight(basis, refocus)
    assert got.stride() == basis.stride() or shape[1] == 1
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, functional.refocus_weight(basis.contiguous(), refocus))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"basis": None}, TypeError, r"basis \(=None\) must be a torch.Tensor"),
        (
            {"basis": torch.ones(4, 1, 3, 3, dtype=torch.int64)},
            TypeError,
            r"basis.dtype \(=torch.int64\) must be a floating",
        ),
        ({"basis": torch.randn(4, 3, 3)}, ValueError, r"basis.shape \(=\(4, 3, 3\)\) must be \[C_out"),
        ({"refocus": torch.randn(4, 4, 3)}, ValueError, r"refocus.shape \(=\(4, 4, 3\)\) must be \[N, g, k, k\]"),
        ({"refocus": torch.tensor(1.0)}, ValueError, r"refocus.shape \(=\(\)\) must be \[N, g, k, k\]"),
        ({"refocus": torch.randn(4, 4, 2, 2)}, ValueError, r"refocus.shape\[2:\] \(=\(2, 2\)\) must be square and odd"),
        ({"refocus": torch.randn(4, 4, 3, 5)}, ValueError, r"\(=\(3, 5\)\) must be square and odd"),
        (
            {"refocus": torch.randn(6, 3, 3, 3)},
            ValueError,
            r"refocus.shape\[0\] \(=6\) must be the number of 2-D kernels .* 4 \* 1 = 4",
        ),
        (
            {"refocus": torch.randn(4, 3, 3, 3)},
            ValueError,
            r"refocus.shape\[0\] \(=4\) must be divisible by refocus.shape\[1\] \(=3\)",
        ),
        (
            {"refocus": torch.randn(4, 4, 3, 3).double()},
            TypeError,
            r"refocus.dtype \(=torch.float64\) must be the dtype of basis",
        ),
        (
            {"refocus": torch.randn(4, 4, 3, 3, device="meta")},
            ValueError,
            r"refocus.device \(=meta\) must be the device of basis \(=cpu\)",
        ),
    ],
)
def test_refocus_weight_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    args = {"basis": torch.randn(4, 1, 3, 3), "refocus": torch.randn(4, 4, 3, 3), **changes}
    with pytest.raises(error, match=message):
        functional.refocus_weight(**args)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": None}, TypeError, r"input \(=None\) must be a torch.Tensor"),
        ({"input": X.long()}, TypeError, r"input.dtype \(=torch.int64\) must be a floating-point or complex type"),
        ({"input": X[None]}, ValueError, r"input.shape \(=\(1, 2, 4, 6, 6\)\) must be \[B, C_in, H, W\] or"),
        (
            {"input": X[:, :3]},
            ValueError,
            r"input has 3 channels .* in_channels must be weight.shape\[1\] \* groups = 4",
        ),
        (
            {"input": X.double()},
            TypeError,
            r"input.dtype \(=torch.float64\) must be the dtype of weight \(=torch.float32\)",
        ),
        ({"input": X.to("meta")}, ValueError, r"input.device \(=meta\) must be the device of weight \(=cpu\)"),
        ({"input": X[..., :2]}, ValueError, r"input width \(=2, 2 with padding\) must be at least the width .* \(=3\)"),
        ({"input": X[:, :, :0]}, ValueError, r"input height \(=0, 0 with padding\) must be at least"),
        ({"weight": W[0]}, ValueError, r"weight.shape \(=\(2, 3, 3\)\) must be \[C_out, C_in/groups, K_h, K_w\]"),
        (
            {"weight": W[:0], "bias": B[:0]},
            ValueError,
            r"weight.shape \(=\(0, 2, 3, 3\)\) must have sizes of at least 1",
        ),
        ({"weight": W[:7], "bias": B[:7]}, ValueError, r"weight.shape\[0\] \(=7\) must be divisible by groups \(=2\)"),
        ({"bias": B[:7]}, ValueError, r"bias.shape \(=\(7,\)\) must be \(C_out,\) = \(8,\)"),
        ({"bias": 1.0}, TypeError, r"bias \(=1.0\) must be a torch.Tensor"),
        ({"bias": B.double()}, TypeError, r"bias.dtype \(=torch.float64\) must be the dtype of weight"),
        ({"stride": 0}, ValueError, r"stride \(=0\) must be an int of at least 1, or two of them"),
        ({"stride": (1, 2, 3)}, ValueError, r"stride \(=\(1, 2, 3\)\) must be an int of at least 1"),
        ({"stride": 1.5}, ValueError, r"stride \(=1.5\) must be an int"),
        ({"dilation": (1, 0)}, ValueError, r"dilation \(=\(1, 0\)\) must be an int of at least 1"),
        ({"padding": -1}, ValueError, r"padding \(=-1\) must be an int of at least 0"),
        ({"padding": "full"}, ValueError, r"padding \(='full'\) must be 'same', 'valid', an int"),
        ({"padding": "same", "stride": 2}, ValueError, r"padding='same' needs stride 1, got stride \(=\(2, 2\)\)"),
        ({"padding_mode": "mirror"}, ValueError, r"padding_mode \(='mirror'\) must be one of \('zeros', 'reflect'"),
        ({"groups": 0}, ValueError, r"groups \(=0\) must be a positive int"),
        ({"groups": True}, ValueError, r"groups \(=True\) must be a positive int"),
    ],
)
def test_conv2d_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    args = {"input": X, "weight": W, "bias": B, "groups": 2, **changes}
    with pytest.raises(error, match=message):
        functional.conv2d(**args)


@pytest.mark.parametrize(("out_channels", "channels", "groups"), [(0, 4, 1), (4, 0, 1), (0, 4, 4)])
def test_layers_without_kernels_are_refused(out_channels: int, channels: int, groups: int) -> None:
    basis = torch.randn(out_channels, channels // groups, 3, 3)
    refocus = torch.randn(basis.shape[0] * basis.shape[1], groups, 3, 3)
    with pytest.raises(ValueError, match="must have sizes of at least 1"):
        functional.refconv2d(torch.randn(1, channels, 5, 5), basis, refocus, None, (1, 1), (1, 1), (1, 1), groups)


def test_refconv2d_groups_must_match_the_refocusing_weights() -> None:
    with pytest.raises(ValueError, match=r"refocus.shape\[1\] \(=2\) must be groups \(=4\), Eq. 2"):
        functional.refconv2d(X, torch.randn(4, 1, 3, 3), torch.randn(4, 2, 3, 3), groups=4)


def test_meta_tensors_give_shapes() -> None:
    y = functional.refconv2d(
        X.to("meta"), torch.empty(4, 1, 3, 3, device="meta"), torch.empty(4, 4, 3, 3, device="meta"), groups=4
    )
    assert y.shape == (2, 4, 4, 4)


@pytest.mark.parametrize("stride", [(0, 1), (1.5, 1), ("a", 1)], ids=str)
def test_bad_pairs_are_named_where_both_steps_are_one_call(stride: tuple[object, int]) -> None:
    x, basis, refocus = torch.randn(1, 8, 5, 5), torch.randn(8, 1, 3, 3), torch.zeros(8, 8, 3, 3)
    with pytest.raises(ValueError, match=r"stride \(=\(.*, 1\)\) must be an int of at least 1, or two of them"):
        functional.refconv2d(x, basis, refocus, stride=stride, padding=(1, 1), dilation=(1, 1), groups=8)


# --- the thin form ------------------------------------------------------------------------------------------


def thin_problem(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    basis = torch.randn(16, 1, 3, 3).to(dtype)
    return {
        "basis": basis,
        "coordinates": torch.randn(16, 9).to(dtype),
        "factor": functional.refocus_factor(basis, 16),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_thin_halves_are_combined_in_float32_and_rounded_once(dtype: torch.dtype, backend: str) -> None:
    problem = thin_problem(dtype)
    with use_backend(backend):
        got = functional.thin_refocus_weight(**problem)
        want = functional.thin_refocus_weight(**{name: t.float() for name, t in problem.items()})
    assert got.dtype == dtype
    torch.testing.assert_close(got, want.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_autocast_computes_the_thin_form_in_float32() -> None:
    problem, x = thin_problem(), torch.randn(2, 16, 6, 6)
    problem["coordinates"].requires_grad_()
    want = functional.thin_refocus_weight(**problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(functional.thin_refocus_weight(**problem), want)
        y = functional.thin_refconv2d(x, **problem, groups=16)
        plain = F.conv2d(x, want, groups=16)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, plain)
    y.float().sum().backward()
    assert problem["coordinates"].grad.dtype == torch.float32


def test_thin_weight_keeps_the_memory_format(backend: str) -> None:
    basis = torch.randn(8, 4, 5, 3).to(memory_format=torch.channels_last)
    factor = functional.refocus_factor(basis, 2)
    with use_backend(backend):
        got = functional.thin_refocus_weight(basis, torch.randn(32, 15), factor)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_complex_takes_the_reference_path_in_the_thin_form() -> None:
    problem = {name: t.to(torch.complex64) for name, t in thin_problem().items()}
    want = problem["basis"] + (problem["coordinates"] @ problem["factor"][0]).view(16, 1, 3, 3)
    torch.testing.assert_close(functional.thin_refocus_weight(**problem), want)
    with pytest.raises(TypeError, match=r"basis.dtype \(=torch.complex64\) must be a real floating-point type"):
        functional.refocus_factor(problem["basis"], 16)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"coordinates": None}, TypeError, r"coordinates \(=None\) must be a torch.Tensor"),
        ({"basis": torch.randn(16, 3, 3)}, ValueError, r"basis.shape \(=\(16, 3, 3\)\) must be \[C_out"),
        ({"coordinates": torch.randn(16, 9, 1)}, ValueError, r"coordinates.shape \(=.*\) must be \[N, r\]"),
        ({"factor": torch.randn(9, 9)}, ValueError, r"factor.shape \(=\(9, 9\)\) must be \[N/g, r, K_h \* K_w\]"),
        ({"coordinates": torch.randn(15, 9)}, ValueError, r"coordinates.shape\[0\] \(=15\) must be .* 16 \* 1 = 16"),
        ({"coordinates": torch.randn(16, 8)}, ValueError, r"factor.shape\[1:\] \(=\(9, 9\)\) must be .* = \(8, 9\)"),
        ({"factor": torch.randn(1, 9, 8)}, ValueError, r"factor.shape\[1:\] \(=\(9, 8\)\) must be .* = \(9, 9\)"),
        ({"factor": torch.randn(3, 9, 9)}, ValueError, r"factor.shape\[0\] \(=3\) must divide .* \(=16\)"),
        ({"factor": torch.randn(0, 9, 9)}, ValueError, r"factor.shape\[0\] \(=0\) must divide"),
        ({"coordinates": torch.randn(16, 9).double()}, TypeError, r"coordinates.dtype \(=torch.float64\) must be"),
        ({"factor": torch.randn(1, 9, 9).double()}, TypeError, r"factor.dtype \(=torch.float64\) must be the dtype of"),
        ({"factor": torch.randn(1, 9, 9, device="meta")}, ValueError, r"factor.device \(=meta\) must be the device"),
    ],
)
def test_thin_refocus_weight_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {**thin_problem(), **changes}
    with pytest.raises(error, match=message):
        functional.thin_refocus_weight(**arguments)
    with pytest.raises(error):
        functional.thin_refconv2d(torch.randn(1, 16, 5, 5), **arguments, groups=16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(6, 1, 3, 3), 4), ValueError, r"basis has 6 2-D kernels, which groups \(=4\) must divide"),
        ((torch.randn(6, 1, 3, 3), 0), ValueError, r"groups \(=0\) must be a positive int"),
        ((torch.randn(6, 1, 3, 3), 6, 2), ValueError, r"map_size \(=2\) must be a positive odd int"),
        ((torch.randn(6, 3, 3), 6), ValueError, r"basis.shape \(=\(6, 3, 3\)\) must be"),
        (("basis", 6), TypeError, r"basis \(='basis'\) must be a torch.Tensor"),
    ],
)
def test_refocus_factor_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.refocus_factor(*arguments)


def test_groups_must_match_the_factor() -> None:
    message = r"factor.shape\[0\] \(=1\) must be the number of 2-D kernels / groups, 16 / 8"
    with pytest.raises(ValueError, match=message):
        functional.thin_refconv2d(torch.randn(1, 8, 5, 5), **thin_problem(), groups=8)
