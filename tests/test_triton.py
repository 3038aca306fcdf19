"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter (tests/conftest.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.compiled_kernels import TARGETS
from refconv_kernels import RefConv2d, functional, ops, use_backend
from refconv_kernels.backends import triton
from tests.cases import CASES, SMALL, UNIT, Case
from tests.test_ops import DTYPES, KERNEL_DTYPES, _samples, check, operators
from tests.tolerances import assert_close

pytestmark = [
    pytest.mark.skipif(ops.UNAVAILABLE["triton"] is not None, reason=f"triton: {ops.UNAVAILABLE['triton']}"),
    # Triton 3.6's interpreter, which works with NumPy before 2.4 only.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
DEVICE = "cpu" if triton.INTERPRETED else "cuda"
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Case, layout: torch.memory_format) -> None:
    check(case, "triton", torch.float32, layout, DEVICE)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    for layout in LAYOUTS:
        check(case, "triton", dtype, layout, DEVICE)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("batch", "channels", "height", "width"),
    [
        (1, 2, 8, 127),  # a tile of NCHW has 128 strips of up to 8 rows
        (1, 2, 8, 128),
        (1, 2, 7, 129),
        (1, 2, 9, 15),  # rows are left over in the last strips
        (2, 2, 5, 3),
        (1, 2, 10, 3),
        (19, 3, 7, 7),  # several images in a tile, the last one in two
        (2, 63, 3, 3),  # a tile of channels_last has up to 64 channels, and 8 strips of them
        (2, 64, 4, 4),
        (1, 65, 1, 17),
    ],
)
def test_sizes_that_straddle_the_tiles(batch: int, channels: int, height: int, width: int) -> None:
    case = Case("tiles", channels, channels, (3, 3), channels, batch=batch, height=height, width=width)
    for layout in LAYOUTS:
        check(case, "triton", torch.float32, layout, DEVICE)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1)], ids=str)
def test_sums_of_several_chunks(stride: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from refconv_kernels.backends.triton import depthwise, reduction

    monkeypatch.setattr(reduction, "_TILE", 1)  # one chunk at a time
    monkeypatch.setattr(depthwise, "_PROGRAMS", 4)  # two channels: two chunks of several tiles
    monkeypatch.setattr(depthwise, "_FORWARD_PROGRAMS", 4)  # forward: several tiles in a program
    case = Case("chunks", 2, 2, (3, 3), 2, stride=stride, batch=3, height=31, width=30)
    for layout in LAYOUTS:
        check(case, "triton", torch.float32, layout, DEVICE)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "case",
    [
        Case("9x9", 3, 3, (9, 9), 3, padding=(4, 4), height=10, width=11),  # dW by blocks of rows
        Case("31x2", 2, 2, (31, 2), 2, padding=(15, 0), height=9),
        Case("2x31", 2, 4, (2, 31), 2, padding=(0, 15), stride=(2, 1), height=9),
        Case("7x7_stride", 3, 3, (7, 7), 3, padding=(2, 3), stride=(2, 2), height=12, width=13),
        Case("no_padding", 3, 3, (3, 3), 3, padding=(0, 0)),  # no tap meets every pixel of dy: dbias on its own
        Case("wide_padding", 3, 3, (3, 3), 3, padding=(4, 3)),
        Case("stride_beyond_kernel", 3, 3, (2, 2), 3, padding=(0, 0), stride=(5, 4), height=12, width=13),
        Case(
            "stride_and_dilation", 3, 6, (3, 3), 3, stride=(2, 4), dilation=(4, 2), padding=(3, 1), height=13, width=12
        ),
    ],
    ids=str,
)
def test_unusual_geometry(case: Case) -> None:
    for layout in LAYOUTS:
        check(case, "triton", torch.float32, layout, DEVICE)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "case",
    [
        # 132 strips, two tiles; 275 entries of W_r in a row, two blocks.
        Case("tiles", 11, 11, (3, 3), 11, batch=11, height=4, width=12, map_size=5),
        Case("stride", 3, 3, (3, 3), 3, stride=(2, 2), height=9, width=8),
        Case("stride_even", 3, 3, (3, 3), 3, stride=(2, 2), height=8, width=9),
        Case("map_5", 11, 11, (2, 3), 11, padding=(0, 1), map_size=5, bias=False),
        Case("bias_on_its_own", 3, 3, (3, 3), 3, padding=(0, 0), dilation=(1, 2)),
        Case("one_tap", 4, 4, (1, 1), 4, padding=(0, 0), map_size=1),
    ],
    ids=str,
)
def test_both_steps_in_one_kernel(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from refconv_kernels.backends.triton import fused

    launched = []
    for name in ("forward", "backward"):
        run = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *args, run=run: launched.append(run) or run(*args))
    monkeypatch.setattr(fused, "FEWEST_CHANNELS", 1)
    for dtype in KERNEL_DTYPES:
        check(case, "triton", dtype, torch.contiguous_format, DEVICE)
    assert len(launched) == 4


def test_which_problems_run_in_one_kernel() -> None:
    from refconv_kernels.backends.triton.fused import fuses

    x, weight = torch.empty(128, 960, 7, 7, device="meta"), torch.empty(960, 1, 3, 3, device="meta")
    assert fuses(x, weight)
    assert not fuses(x.to(memory_format=torch.channels_last), weight)
    assert not fuses(torch.empty(256, 960, 7, 7, device="meta"), weight)  # many pixels per channel
    assert not fuses(x[:, :96], weight[:96])  # few channels
    assert not fuses(x, torch.empty(960, 1, 5, 5, device="meta"))
    assert not fuses(x[:, :480], weight)
    assert not fuses(x[:0], weight)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("basis", "groups", "map_size"),
    [
        ((7, 1, 3, 3), 7, 3),  # 63 entries of W_r per 2-D kernel: narrow; from 64 on wide
        ((8, 1, 3, 3), 8, 3),
        ((33, 1, 3, 3), 33, 3),  # more than one block of a row, and of rows
        ((130, 1, 1, 1), 130, 1),
        ((12, 1, 9, 8), 12, 3),  # more pixels than a program takes
        ((3, 2, 9, 8), 2, 3),
        ((6, 4, 5, 2), 2, 5),
        ((6, 4, 5, 2), 3, 5),
        ((20, 18, 3, 3), 1, 3),  # several blocks of 2-D kernels
        ((5, 7, 3, 3), 1, 7),
    ],
)
def test_weight_transform(basis: tuple[int, ...], groups: int, map_size: int, dtype: torch.dtype) -> None:
    kernels = torch.randn(basis, dtype=dtype, device=DEVICE)
    maps = torch.randn(basis[0] * basis[1], groups, map_size, map_size, dtype=dtype, device=DEVICE).requires_grad_()
    cotangent = torch.randn(basis, dtype=dtype, device=DEVICE)
    for identity in (True, False):
        results = []
        for backend, wanted in (("triton", dtype), ("reference", torch.float64)):
            with use_backend(backend):
                transformed = functional.refocus_weight(kernels.to(wanted), maps.to(wanted), identity=identity)
                results.append([transformed, *torch.autograd.grad(transformed, maps, cotangent.to(wanted))])
        assert_close(results[0][0], results[1][0], groups * map_size**2)
        assert_close(results[0][1], results[1][1].to(torch.float64), basis[2] * basis[3])


def test_gradcheck() -> None:
    case = Case("two_channels", 2, 2, (3, 3), 2, batch=1, height=3, width=4)
    tensors = [case.input(), *case.tensors()]
    leaves = [None if t is None else t.to(DEVICE).requires_grad_() for t in tensors]

    def run(*leaves: Tensor) -> Tensor:
        return functional.refconv2d(*leaves, padding=case.padding, groups=case.groups)

    with use_backend("triton"):
        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_two_runs_give_the_same_bits() -> None:
    case = Case("many", 5, 5, (3, 3), 5, batch=3, height=31, width=30)
    x = case.input(torch.float32, DEVICE)
    weight = torch.randn(5, 1, 3, 3, device=DEVICE)
    op = torch.ops.refconv_triton.grouped_conv2d_backward.default
    results = [op(x, x, weight, [1, 1], [1, 1], [1, 1], True, True, True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_infinity_reaches_only_the_taps_that_see_it() -> None:
    x, weight = torch.randn(1, 1, 5, 7, device=DEVICE), torch.randn(1, 1, 3, 3, device=DEVICE)
    x[0, 0, 2, 6] = float("inf")
    op = torch.ops.refconv_triton.grouped_conv2d_backward.default
    got = op(torch.ones(1, 1, 3, 5, device=DEVICE), x, weight, [1, 1], [0, 0], [1, 1], False, True, False)[1]
    assert torch.equal(got.isinf()[0, 0], torch.tensor([[False, False, True]] * 3, device=DEVICE))
    assert not got.isnan().any()


def test_no_tap_sees_what_lies_below_the_map() -> None:
    """Nine rows leave three of the last strip's four over, which would meet the last row of dy."""
    x, dy = torch.ones(1, 1, 9, 7, device=DEVICE), torch.ones(1, 1, 9, 7, device=DEVICE)
    dy[0, 0, 8, 3] = float("inf")
    op = torch.ops.refconv_triton.grouped_conv2d_backward.default
    weight = torch.randn(1, 1, 3, 3, device=DEVICE)
    got = op(dy, x, weight, [1, 1], [1, 1], [1, 1], False, True, False)[1]
    assert torch.equal(got.isinf()[0, 0], torch.tensor([[True] * 3, [True] * 3, [False] * 3], device=DEVICE))
    assert not got.isnan().any()


def test_a_plain_backward_is_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    from refconv_kernels.backends.triton import depthwise, reduction

    seen, launching = [], []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not launching:  # the interpreter has operators of its own
                seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    class Noted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **options: Any) -> None:
                launching.append(self.kernel)
                self.kernel[grid](*args, **options)
                seen.append(launching.pop().__name__)

            return launch

    for module, name in ((depthwise, "backward_kernel"), (reduction, "reduction_kernel")):
        monkeypatch.setattr(module, name, Noted(getattr(module, name)))
    x, weight = torch.randn(2, 3, 5, 6, device=DEVICE), torch.randn(3, 1, 3, 3, device=DEVICE)
    for layout in LAYOUTS:
        dy = x.contiguous(memory_format=layout)
        seen.clear()
        with Operators():
            depthwise.backward(dy, dy, weight, [1, 1], [1, 1], [1, 1], True, True, True)
        free = ("empty", "empty_like", "new_empty", "select", "promote_types")  # launch nothing
        assert [name for name in seen if name not in free] == ["backward_kernel", "reduction_kernel"]


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_only_what_is_needed(wanted: tuple[bool, bool, bool]) -> None:
    x, weight = torch.randn(2, 3, 5, 6, device=DEVICE), torch.randn(3, 1, 3, 3, device=DEVICE)
    op = torch.ops.refconv_triton.grouped_conv2d_backward.default
    every = op(x, x, weight, [1, 1], [1, 1], [1, 1], True, True, True)
    for got, whole, need in zip(op(x, x, weight, [1, 1], [1, 1], [1, 1], *wanted), every, wanted, strict=True):
        if need:
            torch.testing.assert_close(got, whole)
        else:
            assert got.numel() == 0


@pytest.mark.parametrize("name", operators("triton"))
@pytest.mark.parametrize("case", SMALL[:2], ids=str)
def test_opcheck(name: str, case: Case) -> None:
    samples = [t.to(DEVICE) if isinstance(t, Tensor) else t for t in _samples(name, case)]
    torch.library.opcheck(getattr(torch.ops.refconv_triton, name).default, tuple(samples))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
def test_compile_fullgraph() -> None:
    layer = RefConv2d(6, 6, 3, padding=1, groups=6).to(DEVICE)
    x = torch.randn(2, 6, 7, 9, device=DEVICE)
    with use_backend("triton"):
        want = layer(x)
        got = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(got, want)


def test_limits_name_what_is_not_covered() -> None:
    x, weight = torch.empty(1, 4, 5, 5, device=DEVICE), torch.empty(4, 1, 3, 3, device=DEVICE)
    limits = triton.grouped_conv2d_limits
    assert limits(x, weight, 4, UNIT) is None
    assert limits(x, weight, 2, UNIT) == "groups (=2) differs from in_channels (=4), the kernel is depthwise"
    large = torch.empty(4, 1, 3, 32, device=DEVICE)
    assert limits(x, large, 4, UNIT) == "kernel_size (=(3, 32)), the kernel covers at most 31"
    huge = torch.empty(1, 4, 40000, 20000, device="meta")
    assert "is beyond 2^31 pixels, or elements of an image" in limits(huge, weight, 4, UNIT)
    many = torch.empty(65536, 1, 3, 3, device="meta")
    assert limits(x, many, 4, UNIT) == "out_channels (=65536), the kernel covers less than 65536"
    assert limits(x.cfloat(), weight, 4, UNIT).startswith("input has dtype torch.complex64, the kernel covers")
    assert triton.refocus_weight_limits(weight.half(), weight).startswith("basis has dtype torch.float16")
    assert triton.refocus_weight_limits(weight.to("meta"), weight) == f"basis is on meta, the kernel runs on {DEVICE}"
    assert triton.refconv2d_limits(x, weight, weight, 2, UNIT) is None
    how = triton.refconv2d_how(x, weight, weight, 2, UNIT)
    assert how == f"with a kernel for W_t; convolved by PyTorch: {limits(x, weight, 2, UNIT)}"


def test_auto_leaves_the_interpreter_alone() -> None:
    x, weight = torch.empty(1, 4, 5, 5, device=DEVICE), torch.empty(4, 1, 3, 3, device=DEVICE)
    assert (ops.choose("grouped_conv2d", x, weight, 4, UNIT) == "triton") is (DEVICE == "cuda")


_GUARDED = """
import torch
from refconv_kernels.backends.triton import depthwise, refocus
from tests.cases import SMALL
from tests import interpreter
from tests.guard import guarded
interpreter.quicken()
for case in SMALL:
    for layout in (torch.contiguous_format, torch.channels_last):
        if isinstance(case.padding, str):
            continue
        x, (basis, maps, bias) = case.input(torch.float32).to(memory_format=layout), case.tensors(torch.float32)
        x, basis, maps = guarded(x), guarded(basis), guarded(maps)
        refocus.forward(basis, maps, True)
        refocus.backward(guarded(basis), basis, *maps.shape[1:3])
        if case.groups == case.in_channels:
            geometry = case.stride, case.padding, case.dilation
            y = depthwise.forward(x, basis, None if bias is None else guarded(bias), *geometry)
            depthwise.backward(guarded(y), x, basis, *geometry, True, True, True)
print("whole")
"""
_BEYOND = """
import torch
import triton
from tests.guard import guarded
@triton.jit
def read(x, y):
    i = triton.language.arange(0, 8)
    triton.language.store(y + i, triton.language.load(x + i))
read[(1,)](guarded(torch.randn(6)), torch.empty(8))
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="the guard pages are of main memory")
def test_nothing_beyond_the_inputs_is_read() -> None:
    done = subprocess.run([sys.executable, "-c", _GUARDED], capture_output=True, text=True)
    assert done.stdout.strip() == "whole", done.stderr[-2000:]


@pytest.mark.skipif(DEVICE == "cuda", reason="the guard pages are of main memory")
def test_the_guard_catches_an_access_beyond(tmp_path) -> None:
    (tmp_path / "beyond.py").write_text(_BEYOND)  # Triton reads the source of a kernel from a file
    done = subprocess.run(
        [sys.executable, str(tmp_path / "beyond.py")],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == -11, done.stderr


def test_every_kernel_compiles_without_a_spill() -> None:
    """For every target, without a GPU; ``python -m benchmarks.compiled_kernels`` has more problems."""
    command = [sys.executable, "-m", "benchmarks.compiled_kernels", "--quick"]
    names = list(TARGETS)
    halves = [
        subprocess.Popen([*command, *half], stdout=subprocess.PIPE, text=True) for half in (names[::2], names[1::2])
    ]
    for process in halves:
        printed, _ = process.communicate()
        assert process.returncode == 0, printed
        assert "no kernel spills" in printed
        kernels = (
            "forward_kernel",
            "backward_kernel",
            " thin ",
            "fused_",
            "wide_",
            "narrow_",
            "product_",
            "reduction_",
        )
        assert all(kernel in printed for kernel in kernels)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_a_strided_bias(layout: torch.memory_format) -> None:
    x = torch.randn(1, 6, 5, 5, device=DEVICE).contiguous(memory_format=layout)
    weight, bias = torch.randn(6, 1, 3, 3, device=DEVICE), torch.randn(6, 2, device=DEVICE)[:, 1]
    with use_backend("triton"):
        got = functional.conv2d(x, weight, bias, padding=1, groups=6)
    torch.testing.assert_close(got, torch.nn.functional.conv2d(x, weight, bias, padding=1, groups=6))
