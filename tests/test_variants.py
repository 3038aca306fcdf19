"""The Refocusing Transformations of Table VII, alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refconv_kernels import (
    VARIANTS,
    ParallelRefocusing,
    RefConv2d,
    RefocusingTransformation,
    StackedRefocusing,
    refocus,
    summary,
    use_backend,
    variant,
)
from refconv_kernels.learning.models import MobileNetV2
from refconv_kernels.variants import SqueezeExcitation
from tests.cases import CASES, Case

NAMES = tuple(VARIANTS)
COMPLEX = NAMES[1:]  # without the default transformation
PICKED = ("depthwise_multiplier", "depthwise_asymmetric", "depthwise_7x7_map_5", "groupwise", "dense_rectangular")
PROBLEMS = [case for case in CASES if case.name in PICKED]
every_variant = pytest.mark.parametrize("name", COMPLEX)


def layer_with(name: str, case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> RefConv2d:
    conv = nn.Conv2d(*case.args, **case.options, dtype=dtype)
    return RefConv2d.from_conv(conv, transform=variant(name, conv, map_size=case.map_size, **options))


def plain(name: str, basis: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """Eq. 3 to 8 word by word, on ``[1, N, K_h, K_w]``."""
    kernels = basis.shape[0] * basis.shape[1]
    image = basis.reshape(1, kernels, *basis.shape[2:])

    def conv(image: Tensor, n: int) -> Tensor:
        weight = parameters[f"weights.{n}"]
        return F.conv2d(image, weight, padding=weight.shape[-1] // 2, groups=kernels // weight.shape[1])

    def se(image: Tensor) -> Tensor:
        squeezed = F.adaptive_avg_pool2d(image, 1)
        reduction, expansion = (parameters[f"attention.{key}"][:, :, None, None] for key in ("reduction", "expansion"))
        return image * F.conv2d(F.conv2d(squeezed, reduction).relu(), expansion).sigmoid()

    if name == "2B1L":
        moved = conv(image, 0) + conv(image, 1)
    elif name == "3B1L":
        moved = conv(image, 0) + conv(image, 1) + conv(image, 2)
    elif name == "1B2L":
        moved = conv(conv(image, 0), 1)
    elif name == "1B2L+GELU":
        moved = conv(F.gelu(conv(image, 0)), 1)
    elif name == "1B1L+SE":
        moved = se(conv(image, 0))
    else:
        assert name == "1B2L+SE"
        moved = conv(se(conv(image, 0)), 1)
    return moved.reshape(basis.shape) + basis


def test_seven_variants() -> None:
    assert NAMES == ("1B1L", "2B1L", "3B1L", "1B2L", "1B2L+GELU", "1B1L+SE", "1B2L+SE")
    assert type(variant("1B1L", nn.Conv2d(4, 4, 3))) is RefocusingTransformation


@pytest.mark.parametrize("case", PROBLEMS, ids=str)
@every_variant
def test_equals_plain_convolutions(name: str, case: Case, backend: str) -> None:
    layer = layer_with(name, case, torch.float64)
    transform, basis, parameters = layer.transform, layer.basis_weight, dict(layer.transform.named_parameters())
    with torch.no_grad():  # far from the small initial values, so that GELU and the attention bend
        for parameter in parameters.values():
            parameter.normal_()
    with use_backend(backend):
        got, want = transform(basis), plain(name, basis, parameters)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        direction = torch.randn_like(got)
        leaves = list(parameters.values())
        torch.testing.assert_close(
            torch.autograd.grad(got, leaves, direction),
            torch.autograd.grad(want, leaves, direction),
            rtol=1e-10,
            atol=1e-10,
        )


@every_variant
def test_gradcheck(name: str, backend: str) -> None:
    conv = nn.Conv2d(4, 4, (3, 4), groups=2, bias=False, dtype=torch.float64)
    transform = variant(name, conv)
    names, leaves = zip(*transform.named_parameters(), strict=True)

    def function(basis: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(transform, dict(zip(names, values, strict=True)), (basis,))

    with use_backend(backend):
        assert torch.autograd.gradcheck(function, (conv.weight, *leaves), fast_mode=True)


@pytest.mark.parametrize(
    ("name", "stages", "millions"),  # Table VII; 3.56 million are the network's without RefConv
    [
        ("1B1L", 1, 44.11),
        ("2B1L", 2, 84.66),
        ("3B1L", 3, 125.21),
        ("1B2L", 2, 84.66),
        ("1B2L+GELU", 2, 84.66),
        ("1B1L+SE", 1, 46.36),
        ("1B2L+SE", 2, 86.91),
    ],
)
def test_table_7(name: str, stages: int, millions: float) -> None:
    with torch.device("meta"):
        model = MobileNetV2()
    model = refocus(model, lambda _, conv: conv.groups > 1, transform=lambda conv: variant(name, conv))
    rows = summary(model).layers
    added = sum(row.transform_parameters for row in rows)
    widths = [row.basis_shape[0] for row in rows]
    attention = sum(2 * n * (n // 4) for n in widths) if "SE" in name else 0
    assert added == stages * 9 * sum(n * n for n in widths) + attention
    # The table grows by 40.55 per W_r, not by 40.61: as if the frozen W_b (0.06) were subtracted once for each.
    assert (added - stages * 9 * sum(widths)) / 1e6 == pytest.approx(millions - 3.56, abs=0.005 * stages)


@pytest.mark.parametrize("branches", [2, 3])
def test_parallel_branches_train_like_one_with_a_larger_step(branches: int) -> None:
    basis = torch.randn(8, 1, 3, 3, dtype=torch.float64)
    target = torch.randn_like(basis)
    many = ParallelRefocusing(8, 8, branches=branches, dtype=torch.float64)
    one = RefocusingTransformation(8, 8, dtype=torch.float64)
    with torch.no_grad():
        one.weight.copy_(sum(many.weights))
    first = one(basis).detach()
    optimizers = [
        torch.optim.SGD(many.parameters(), lr=0.01, momentum=0.9),
        torch.optim.SGD(one.parameters(), lr=0.01 * branches, momentum=0.9),
    ]
    for _ in range(5):
        for transform, optimizer in zip((many, one), optimizers, strict=True):
            optimizer.zero_grad()
            (transform(basis) - target).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(many(basis), one(basis), rtol=1e-10, atol=1e-10)
    assert (one(basis) - first).abs().max() > 0.1  # it did train


@every_variant
def test_zero_initialisation(name: str) -> None:
    case = Case("wide", 32, 32, (3, 3), 32)  # with few kernels all of the attention's ReLUs may be shut
    layer, x = layer_with(name, case, init="zeros"), case.input(torch.float32)
    transform = layer.transform
    assert torch.equal(layer.weight, layer.basis_weight)
    layer(x).square().sum().backward()
    for weight in transform.weights if isinstance(transform, ParallelRefocusing) else transform.weights[-1:]:
        assert not weight.any()
        assert weight.grad.any()
    torch.optim.SGD(transform.parameters(), lr=1e-3).step()
    transform.zero_grad()
    layer(x).square().sum().backward()
    assert all(p.grad.any() for p in transform.parameters())  # from the second step on everything trains


@every_variant
def test_without_identity_is_the_difference(name: str) -> None:
    conv = nn.Conv2d(6, 6, 3, groups=6, dtype=torch.float64)
    transform, without = variant(name, conv), variant(name, conv, identity=False)
    without.load_state_dict(transform.state_dict())
    torch.testing.assert_close(transform(conv.weight) - conv.weight, without(conv.weight))
    assert "identity=False" in repr(without)
    assert "identity" not in repr(transform)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_variant
def test_half_precision_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    conv = nn.Conv2d(8, 8, 3, groups=8, dtype=dtype)
    transform = variant(name, conv)
    want = copy.deepcopy(transform).float()(conv.weight.float()).to(dtype)
    assert torch.equal(transform(conv.weight), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transform(conv.weight), want)
        assert torch.equal(copy.deepcopy(transform).float()(conv.weight.float()).to(dtype), want)
    transform(conv.weight).float().square().sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.any() for p in transform.parameters())


@every_variant
def test_memory_format_follows_the_basis(name: str) -> None:
    conv = nn.Conv2d(4, 6, 3)
    transform, last = variant(name, conv), conv.weight.to(memory_format=torch.channels_last)
    got = transform(last)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, transform(conv.weight))
    assert transform(conv.weight).is_contiguous()


def test_device_dtype_and_options_reach_the_parameters() -> None:
    conv = nn.Conv2d(6, 6, 5, groups=3, dtype=torch.float64, device="meta")
    for name in COMPLEX:
        transform = variant(name, conv, map_size=5, init="kaiming")
        assert {(p.dtype, p.device.type) for p in transform.parameters()} == {(torch.float64, "meta")}
        assert {tuple(w.shape) for w in transform.weights} == {(12, 3, 5, 5)}
        assert "12, 3, map_size=5" in repr(transform)
        assert "init='kaiming'" in repr(transform)
    assert "after_first='gelu'" in repr(variant("1B2L+GELU", conv))


def test_each_stage_is_drawn_by_init() -> None:
    """Same seed, same numbers as layers of the default transformation one after the other."""
    for transform, init in ((ParallelRefocusing, "kaiming"), (StackedRefocusing, "xavier_normal")):
        torch.manual_seed(5)
        got = transform(8, 4, init=init).weights
        torch.manual_seed(5)
        for weight in got:
            assert torch.equal(weight, RefocusingTransformation(8, 4, init=init).weight)


def test_attention_scales_every_kernel_by_a_number_of_its_own() -> None:
    attention = SqueezeExcitation(18)
    assert attention.reduction.shape == (4, 18)
    assert SqueezeExcitation(3).reduction.shape == (1, 3)  # at least one
    kernels = torch.randn(9, 2, 3, 5)
    ratio = attention(kernels) / kernels
    torch.testing.assert_close(ratio, ratio[:, :, :1, :1].expand_as(ratio))
    assert ratio[:, :, 0, 0].unique().numel() == 18
    assert 0 < ratio.min() < ratio.max() < 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: variant("2B2L", nn.Conv2d(4, 4, 3)), r"name \(='2B2L'\) must be one of \('1B1L', '2B1L', '3B1L'"),
        (lambda: variant("1B2L", nn.Conv2d(4, 4, 3), init="ones"), r"init \(='ones'\) must be one of \('xavier'"),
        (lambda: variant("1B2L", nn.Conv2d(4, 4, 3), map_size=2), r"map_size \(=2\) must be a positive odd int"),
        (
            lambda: variant("1B1L", nn.Conv2d(4, 4, (3, 5)), map_size=5),
            r"map_size \(=5\) must be at most the kernel_size \(=\(3, 5\)\)",
        ),
        (
            lambda: variant("1B2L+SE", nn.Conv2d(512, 512, 3, device="meta")),
            r"kernels \(=262144\) would need an attention of 2 \* 262144 \* 65536 = 34,359,738,368 parameters, "
            r"but they must be at most 134,217,728",
        ),
        (lambda: ParallelRefocusing(4, 4, branches=0), r"branches \(=0\) must be a positive int"),
        (lambda: ParallelRefocusing(4, 4, branches=True), r"branches \(=True\) must be a positive int"),
        (lambda: ParallelRefocusing(6, 4), r"kernels \(=6\) must be divisible by group_size \(=4\)"),
        (lambda: StackedRefocusing(4, 4, layers=1.0), r"layers \(=1.0\) must be a positive int"),
        (lambda: StackedRefocusing(6, 4), r"kernels \(=6\) must be divisible by group_size \(=4\)"),
        (
            lambda: StackedRefocusing(4, 4, after_first="relu"),
            r"after_first \(='relu'\) must be None, 'gelu' or 'se'",
        ),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@every_variant
def test_wrong_types(name: str) -> None:
    with pytest.raises(TypeError, match=r"conv \(=Conv1d\) must be a torch.nn.Conv2d"):
        variant(name, nn.Conv1d(4, 4, 3))
    transform = variant(name, nn.Conv2d(4, 4, 3, groups=4))
    with pytest.raises(TypeError, match=r"basis \(=None\) must be a torch.Tensor"):
        transform(None)
    with pytest.raises(TypeError, match=r"weights.0.dtype \(=torch.float32\) must be the dtype of basis"):
        transform(torch.randn(4, 1, 3, 3, dtype=torch.bfloat16))
