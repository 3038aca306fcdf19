"""The thin form's Triton kernels: on a GPU where there is one, else in Triton's interpreter (tests/conftest.py)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from refconv_kernels import RefConv2d, functional, ops, reference, use_backend
from refconv_kernels.backends import triton
from tests.cases import DEPTHWISE, OTHERS, SMALL, UNIT, Case
from tests.test_ops import DTYPES, KERNEL_DTYPES, layout_of
from tests.tolerances import assert_close

pytestmark = [
    pytest.mark.skipif(ops.UNAVAILABLE["triton"] is not None, reason=f"triton: {ops.UNAVAILABLE['triton']}"),
    # Triton 3.6's interpreter, which works with NumPy before 2.4 only.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.usefixtures("poisoned"),
]
DEVICE = "cpu" if triton.INTERPRETED else "cuda"
LAYOUTS = [torch.contiguous_format, torch.channels_last]
TILES = Case("tiles", 3, 3, (3, 3), 3, batch=11)  # 693 pixels: tiles of 512, images in several


def tensors_of(case: Case, dtype: torch.dtype = torch.float64, rank: int | None = None) -> list[Tensor | None]:
    """x, W_b, E, R, bias; R of the basis, or any of ``rank`` rows."""
    basis, refocus, bias = case.tensors()
    factor = functional.refocus_factor(basis, case.groups, case.map_size)
    if rank is not None:
        factor = torch.randn(factor.shape[0], rank, factor.shape[2], dtype=torch.float64)
    coordinates = torch.randn(refocus.shape[0], factor.shape[1], dtype=torch.float64)
    tensors = case.input(), basis, coordinates, factor, bias
    return [None if t is None else t.to(DEVICE, dtype) for t in tensors]


def run(
    case: Case, tensors: list[Tensor | None], layout: torch.memory_format, wanted: str = "xEb", identity: bool = True
) -> list[Tensor]:
    """The output, and the gradients of the tensors named in ``wanted``, of x, B(asis), E, R and b(ias)."""
    leaves = [None if t is None else t.detach().clone() for t in tensors]
    leaves[0] = leaves[0].contiguous(memory_format=layout)
    of = dict(zip("xBERb", leaves, strict=True))
    inputs = [of[name].requires_grad_() for name in wanted if of[name] is not None]
    options = {k: v for k, v in case.options.items() if k != "bias"}
    y = functional.thin_refconv2d(*leaves, **options, identity=identity)
    ramp = torch.linspace(-1, 1, max(1, y.numel()), dtype=torch.float64, device=y.device)[: y.numel()].view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, inputs, ramp.to(y.dtype))]


def check(
    case: Case,
    dtype: torch.dtype = torch.float32,
    layouts: list[torch.memory_format] = LAYOUTS,
    rank: int | None = None,
    **options: object,
) -> None:
    """Against float64 on the reference path."""
    tensors = tensors_of(case, dtype, rank)
    for layout in layouts:
        with use_backend("reference"):
            want = run(case, [None if t is None else t.double() for t in tensors], layout, **options)
            formula = run(case, tensors, layout, **options)
        with use_backend("triton"):
            got = run(case, tensors, layout, **options)
        assert layout_of(got[0]) == layout_of(formula[0])
        for ours, theirs, exact in zip(got, formula, want, strict=True):
            assert ours.dtype == dtype
            if dtype in KERNEL_DTYPES:
                assert_close(ours, exact, max(case.reduction, exact.shape[-1]))
            elif exact.numel():  # halves: at most twice the error of PyTorch's own formula in the same precision
                bound = 2 * (theirs.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
                assert (ours.double() - exact).abs().max() <= bound


@pytest.mark.parametrize("case", [c for c in [*DEPTHWISE, *OTHERS[:2]] if c.kernel_size != (7, 7)], ids=str)
def test_against_float64(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32], ids=str)
@pytest.mark.parametrize("case", SMALL[:5:2], ids=str)
def test_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize(
    "case",
    [
        TILES,
        Case("stride", 3, 3, (3, 3), 3, stride=(2, 2), batch=5, height=15, width=16),
        Case("unlike_sides", 3, 3, (2, 4), 3, padding=(0, 2), stride=(1, 2), dilation=(2, 1)),
        Case("row", 3, 3, (1, 9), 3, padding=(0, 4)),  # as many taps as registers take
        Case("no_padding", 3, 3, (3, 3), 3, padding=(0, 0), dilation=(1, 2)),  # dbias is no tap's
        Case("9x9", 2, 2, (9, 9), 2, padding=(4, 4), height=5, width=5),  # more taps than one kernel adds up
        Case("7x7_stride", 2, 2, (7, 7), 2, padding=(2, 3), stride=(2, 2), height=9, width=8),
    ],
    ids=str,
)
def test_sizes(case: Case) -> None:
    check(case)


def test_more_channels_than_a_tile_has() -> None:
    check(Case("channels", 65, 65, (3, 3), 65, batch=1, height=3, width=3), layouts=LAYOUTS[1:])


@pytest.mark.parametrize("rank", [1, 4, 9, 10, 70])
def test_any_rank(rank: int) -> None:
    check(SMALL[0], rank=rank, layouts=LAYOUTS[:1])


@pytest.mark.parametrize("identity", [True, False])
def test_every_gradient(identity: bool) -> None:
    check(SMALL[0], layouts=LAYOUTS[:1], wanted="xBERb" if identity else "xERb", identity=identity)


@pytest.mark.parametrize("case", SMALL[:2], ids=str)
def test_only_what_is_needed(case: Case) -> None:
    x, *weights, _ = tensors_of(case, torch.float32)
    run_backward = torch.ops.refconv_triton.thin_refconv2d_backward
    arguments = torch.randn(1, case.out_channels, 5, 6, device=DEVICE), x, *weights, True, [1, 1], [1, 1], [1, 1]
    every = run_backward(*arguments, True, True, True, True, True)
    for wanted in ("", "x", "B", "E", "b", "xb", "xE"):
        needs = [name in wanted for name in "xBEb"]
        for got, whole, need in zip(run_backward(*arguments, *needs, True), every, needs, strict=True):
            torch.testing.assert_close(got, whole if need else whole.new_empty(0))


def test_several_tiles_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from refconv_kernels.backends.triton import depthwise, reduction

    monkeypatch.setattr(depthwise, "_FORWARD_PROGRAMS", 1)  # forward: all tiles of a channel in one program
    monkeypatch.setattr(depthwise, "_PROGRAMS", 4)  # backward: two chunks of several tiles
    monkeypatch.setattr(reduction, "_TILE", 1)  # one chunk at a time
    check(Case("chunks", 2, 2, (3, 3), 2, batch=2, height=31, width=30))


def test_which_problems_make_their_weights_in_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    from refconv_kernels.backends.triton import thin as kernels

    products = []
    product_kernel = kernels._product
    monkeypatch.setattr(kernels, "_product", lambda *args, **kw: products.append(1) or product_kernel(*args, **kw))
    for case, launches in ((SMALL[0], 0), (SMALL[1], 2), (Case("5x5", 3, 3, (5, 5), 3, padding=(2, 2)), 2)):
        products.clear()
        check(case, layouts=LAYOUTS[:1])
        assert len(products) == launches  # W_t, forward and backward; dE is the end of the sum
        x, basis, coordinates, factor, _ = tensors_of(case)
        how = triton.thin_refconv2d_how(x, basis, coordinates, factor, case.groups, UNIT)
        assert how.startswith("with a kernel of its own for W_t: " if launches else "with W_t made in registers: ")
    assert how.endswith("25 coordinates for 5x5 kernels, multiplier 1; registers take 9 coordinates and taps at most, "
                        "and multiplier 1")  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("basis", "groups", "rank"),
    [
        ((7, 1, 3, 3), 7, 9),
        ((300, 1, 3, 3), 300, 9),  # several blocks of rows
        ((12, 1, 3, 3), 6, 9),  # a channel multiplier
        ((6, 4, 5, 2), 2, 10),
        ((20, 18, 3, 3), 1, 9),  # dense: a matrix for every 2-D kernel
        ((3, 1, 7, 7), 3, 49),
        ((3, 2, 9, 8), 2, 18),  # several blocks of pixels
        ((5, 7, 1, 1), 1, 1),
    ],
)
def test_weight_transform(basis: tuple[int, ...], groups: int, rank: int, dtype: torch.dtype) -> None:
    kernels, size = basis[0] * basis[1], basis[2] * basis[3]
    sizes = basis, (kernels, rank), (kernels // groups, rank, size)
    tensors = [torch.randn(shape, dtype=dtype, device=DEVICE) for shape in sizes]
    cotangent = torch.randn(basis, dtype=dtype, device=DEVICE)
    for identity in (True, False):
        results = []
        for backend, wanted in (("triton", dtype), ("reference", torch.float64)):
            weights, coordinates, factor = (t.to(wanted) for t in tensors)
            coordinates.requires_grad_()
            with use_backend(backend):
                transformed = functional.thin_refocus_weight(weights, coordinates, factor, identity=identity)
                results.append([transformed, *torch.autograd.grad(transformed, coordinates, cotangent.to(wanted))])
        for got, want, terms in zip(*results, (rank, size), strict=True):
            assert got.dtype == dtype
            assert_close(got, want, terms)


def test_gradcheck() -> None:
    case = Case("one_channel", 1, 1, (3, 3), 1, batch=1, height=3, width=4)
    leaves = [None if t is None else t.requires_grad_() for t in tensors_of(case)]

    def call(*leaves: Tensor) -> Tensor:
        return functional.thin_refconv2d(*leaves, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=case.groups)

    with use_backend("triton"):
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_two_runs_give_the_same_bits() -> None:
    for layout in LAYOUTS:
        case, tensors = TILES, tensors_of(TILES, torch.float32)
        with use_backend("triton"):
            results = [run(case, tensors, layout, "xBERb") for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter
def test_an_infinite_bias_gradient_stays_there() -> None:
    x, basis, coordinates, factor, _ = tensors_of(SMALL[0], torch.float32)
    grad = torch.zeros_like(x)
    grad[..., 0, 0], x[..., 0, 0] = float("inf"), 1
    arguments = grad, x, basis, coordinates, factor, True, [1, 1], [1, 1], [1, 1], False, True, True, True, True
    _, dw, de, db = torch.ops.refconv_triton.thin_refconv2d_backward(*arguments)
    assert db.isinf().all()
    assert torch.equal(de.isnan(), reference.thin_refocus_weight_backward(dw, factor).isnan())


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
def test_compile_fullgraph() -> None:
    layer = RefConv2d(6, 6, 3, padding=1, groups=6, form="thin").to(DEVICE)
    x = torch.randn(2, 6, 7, 9, device=DEVICE)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with use_backend("triton"):
        results = []
        for call in (layer, compiled):
            y = call(x)
            results.append([y, *torch.autograd.grad(y.sum(), [layer.transform.weight, layer.bias])])
    torch.testing.assert_close(*results)


def test_limits_name_what_is_not_covered() -> None:
    x, basis = torch.empty(1, 4, 5, 5, device=DEVICE), torch.empty(4, 1, 3, 3, device=DEVICE)
    rest = torch.empty(4, 9, device=DEVICE), torch.empty(1, 9, 9, device=DEVICE)
    assert triton.thin_refocus_weight_limits(basis, *rest) is None
    limits, how = triton.thin_refconv2d_limits, triton.thin_refconv2d_how
    assert limits(x, basis, *rest, 4, UNIT) is None
    assert limits(x, basis, *rest, 2, UNIT) is None
    reason = "groups (=2) differs from in_channels (=4), the kernel is depthwise"
    assert how(x, basis, *rest, 2, UNIT) == f"with a kernel for W_t; convolved by PyTorch: {reason}"
    assert limits(x, basis.cfloat(), *rest, 4, UNIT).startswith("basis has dtype torch.complex64")
    assert limits(x.cfloat(), basis, *rest, 4, UNIT).startswith("input has dtype torch.complex64")
    assert (ops.choose("thin_refconv2d", x, basis, *rest, 4, UNIT) == "triton") is (DEVICE == "cuda")


_GUARDED = """
import torch
from refconv_kernels.backends.triton import thin
from tests.cases import SMALL, Case
from tests.guard import guarded
from tests.test_triton_thin import tensors_of
for case in [*SMALL[:2], *SMALL[4:], Case("5x5", 2, 2, (5, 5), 2, padding=(2, 2), height=5, width=4)]:
    for layout in (torch.contiguous_format, torch.channels_last):
        if isinstance(case.padding, str):
            continue
        x, *rest = (None if t is None else guarded(t) for t in tensors_of(case, torch.float32))
        basis, coordinates, factor, bias = rest
        x = guarded(x.contiguous(memory_format=layout))
        thin.forward(basis, coordinates, factor, True)
        thin.backward(guarded(basis), factor)
        if case.groups == case.in_channels:
            geometry = case.stride, case.padding, case.dilation
            y = thin.convolution_forward(x, basis, coordinates, factor, bias, True, *geometry)
            arguments = guarded(y), x, basis, coordinates, factor, True, *geometry
            thin.convolution_backward(*arguments, True, True, True, True)
print("whole")
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="the guard pages are of main memory")
def test_nothing_beyond_the_inputs_is_read() -> None:
    done = subprocess.run([sys.executable, "-c", _GUARDED], capture_output=True, text=True)
    assert done.stdout.strip() == "whole", done.stderr[-2000:]
