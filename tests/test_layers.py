"""Both steps of a layer as one operator: which layers, with whose convolution, and under autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from refconv_kernels import functional, ops, use_backend
from refconv_kernels.backends import triton
from tests.cases import DEPTHWISE, OTHERS, UNIT, Case
from tests.conftest import BACKENDS, needs_native

KERNELS = [name for name in BACKENDS if name != "reference"]
if ops.UNAVAILABLE["triton"] is None and triton.INTERPRETED:
    KERNELS.append("triton")
LAYOUTS = [torch.contiguous_format, torch.channels_last]
NAMED = {case.name: case for case in DEPTHWISE + OTHERS}
LAYERS = [  # and whether the CPU's convolution is its own
    (NAMED["depthwise"], True),
    (NAMED["depthwise_stride"], True),
    (NAMED["depthwise_multiplier"], True),
    (Case("no_padding", 3, 3, (3, 3), 3, padding=(0, 0)), True),
    (NAMED["groupwise"], True),
    (NAMED["groupwise_wide"], True),
    (Case("many_per_group", 34, 4, (3, 3), 2), False),
    (NAMED["dense"], False),
    (NAMED["dense_rectangular"], False),
    (NAMED["dense_empty_batch"], False),
]


class Seen(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    def matching(self, *parts: str) -> list[str]:
        return [name for name in self.names if any(part in name for part in parts)]


def leaves_of(case: Case, form: str, layout: torch.memory_format, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Input, and the tensors of a layer in either form; those that are trained require gradients."""
    *weights, bias = case.tensors(dtype) if form == "full" else case.thin_tensors(dtype)
    leaves = [t.contiguous(memory_format=layout) if t.dim() == 4 else t for t in (case.input(dtype), weights[0])]
    leaves += [*weights[1:], bias]
    return [leaf.requires_grad_(n != 1 and not (form == "thin" and n == 3)) for n, leaf in enumerate(leaves)]


def run(case: Case, form: str, leaves: list[Tensor]) -> list[Tensor]:
    """Output and gradients."""
    function = functional.refconv2d if form == "full" else functional.thin_refconv2d
    y = function(*leaves, **{name: value for name, value in case.options.items() if name != "bias"})
    torch.manual_seed(1)
    grads = torch.autograd.grad(y, [t for t in leaves if t.requires_grad], torch.randn(y.shape).to(y.dtype))
    return [y, *grads]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["full", "thin"])
@pytest.mark.parametrize(("case", "own"), LAYERS, ids=str)
@pytest.mark.parametrize("kernels", KERNELS)
def test_one_operator_each_way(kernels: str, case: Case, own: bool, form: str, autocast: torch.dtype | None) -> None:
    operator = f"refconv_{kernels}::{'refconv2d' if form == 'full' else 'thin_refconv2d'}"
    own = own and (kernels == "cpu" or case.groups == case.in_channels)
    # Triton's interpreter cuts bfloat16 off instead of rounding, which errs twice as much.
    worst = 4 if kernels == "triton" and autocast is torch.bfloat16 else 2
    for layout in LAYOUTS:
        leaves = leaves_of(case, form, layout)
        with use_backend(kernels), Seen() as seen, torch.autocast("cpu", autocast, enabled=autocast is not None):
            got = run(case, form, leaves)
        assert seen.matching("refconv", "convolution") == [operator, f"{operator}_backward"]
        assert got[0].grad_fn.own is own
        assert [t.dtype for t in got] == [autocast or torch.float32, *(t.dtype for t in leaves if t.requires_grad)]

        exact = run(case, form, [t.detach().double().requires_grad_(t.requires_grad) for t in leaves])
        with use_backend("reference"), torch.autocast("cpu", autocast, enabled=autocast is not None):
            formula = run(case, form, leaves)
        for ours, theirs, want in zip(got, formula, exact, strict=True):
            assert ours.shape == theirs.shape
            if want.numel():  # compared with the error of PyTorch's own formula in the same precision
                assert ours.stride() == theirs.stride()
                bound = worst * (theirs - want).abs().max() + 16 * torch.finfo(theirs.dtype).eps * want.abs().max()
                assert (ours - want).abs().max() <= bound


@needs_native
@pytest.mark.parametrize(
    ("geometry", "pairs"),
    [
        ((1, 1, 1), UNIT),
        (([2, 1], [1, 1], [1, 2]), ((2, 1), (1, 1), (1, 2))),
        ((1, "same", 2), ((1, 1), (2, 2), (2, 2))),
        ((2, "valid", 1), ((2, 2), (0, 0), (1, 1))),
    ],
    ids=str,
)
def test_numbers_lists_and_names_are_pairs(geometry: Any, pairs: Any) -> None:
    case = NAMED["depthwise"]
    x, (basis, refocus, bias) = case.input(torch.float32), case.tensors(torch.float32)
    with Seen() as seen:
        y = functional.refconv2d(x, basis, refocus, bias, *geometry, case.groups)
    assert seen.matching("refconv", "convolution") == ["refconv_cpu::refconv2d"]
    assert torch.equal(y, functional.refconv2d(x, basis, refocus, bias, *pairs, case.groups))


@needs_native
def test_what_stays_two_steps() -> None:
    case = NAMED["dense"]
    x, (basis, refocus, bias) = case.input(torch.float32), case.tensors(torch.float32)
    narrow = torch.randn(512, 4, 3, 3), torch.randn(2048, 2, 3, 3)  # PyTorch's transformation is faster
    calls = {
        "another padding mode": lambda: functional.refconv2d(x, basis, refocus, bias, 1, 1, padding_mode="circular"),
        "more padding behind than before": lambda: functional.refconv2d(
            x, torch.randn(*basis.shape[:2], 4, 4), refocus, bias, padding="same"
        ),
        "no batch": lambda: functional.refconv2d(x[0], basis, refocus, bias),
        "a slower transformation": lambda: functional.refconv2d(torch.randn(1, 8, 5, 5), *narrow, None, *UNIT, 2),
    }
    for name, call in calls.items():
        with Seen() as seen:
            call()
        assert not seen.matching("refconv_cpu::refconv2d"), name


@needs_native
def test_the_gradient_of_dense_refocusing_weights_takes_the_memory_of_that_of_w_t() -> None:
    case = Case("dense_64", 64, 64, (3, 3), 1)  # 64 kernels at once and more, in every instruction set
    x, (basis, refocus, _) = case.input(torch.float32), case.tensors(torch.float32)
    geometry = case.stride, case.padding, case.dilation
    y, transformed = torch.ops.refconv_cpu.refconv2d(x, basis, refocus, None, True, *geometry, False)
    run = torch.ops.refconv_cpu.refconv2d_backward
    arguments = torch.randn_like(y), x, transformed, basis, 1, 3, *geometry
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as kept:
        dx, dw, dr, _ = run(*arguments, True, True, True, False, False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as over:
        again = run(*arguments, True, False, True, False, False)
    assert torch.equal(again[0], dx)
    assert torch.equal(again[2], dr)
    assert again[1].numel() == 0
    assert again[2]._base is None
    allocated = [sum(event.self_cpu_memory_usage for event in p.key_averages()) for p in (kept, over)]
    assert allocated[0] - allocated[1] >= dw.numel() * dw.element_size()
