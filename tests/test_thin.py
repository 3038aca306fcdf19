"""The mathematics of the thin form, and that training in it is training in the full form."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.networks import MobileNetV2
from refconv_kernels import RefConv2d, functional, refocus, thin, use_backend
from tests.cases import DEPTHWISE, OTHERS, Case

THIN = [  # cases whose thin form is smaller
    case
    for case in (*DEPTHWISE, *OTHERS)
    if case.batch and thin.is_smaller(case.groups, case.map_size, case.kernel_size[0] * case.kernel_size[1])
]


def rank_deficient(basis: Tensor) -> Tensor:
    """All kernels multiples of one that has a single pixel: ``U`` has rank below its columns."""
    basis = basis.clone().zero_()
    basis[..., 0, 0] = torch.arange(1, basis[..., 0, 0].numel() + 1, dtype=basis.dtype).view_as(basis[..., 0, 0])
    return basis


BASES = {"full rank": lambda basis: basis, "rank-deficient": rank_deficient}

# --- decomposition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", BASES.values(), ids=BASES)
@pytest.mark.parametrize("case", THIN, ids=str)
def test_polar_decomposition(case: Case, change: Callable[[Tensor], Tensor]) -> None:
    basis = change(case.tensors()[0])
    seen = thin.unfold(basis, case.groups, case.map_size)
    rotation, factor = thin.decompose(basis, case.groups, case.map_size)
    size = case.kernel_size[0] * case.kernel_size[1]
    assert factor.shape == (len(seen), size, size)
    torch.testing.assert_close(rotation @ factor, seen, rtol=0, atol=1e-13)
    eye = torch.eye(size, dtype=torch.float64).expand_as(factor)
    torch.testing.assert_close(rotation.transpose(1, 2) @ rotation, eye, rtol=0, atol=1e-13)
    torch.testing.assert_close(factor, factor.transpose(1, 2), rtol=0, atol=1e-13)
    assert torch.linalg.eigvalsh(factor).min() >= -1e-12


@pytest.mark.parametrize("case", [c for c in OTHERS if c.batch and c not in THIN], ids=str)
def test_where_it_would_not_be_smaller_the_full_form_has_its_own_coordinates(case: Case) -> None:
    basis, refocus_weights, _ = case.tensors()
    rotation, factor = thin.decompose(basis, case.groups, case.map_size)
    assert torch.equal(factor, thin.unfold(basis, case.groups, case.map_size))
    assert torch.equal(thin.project(refocus_weights, rotation), refocus_weights.flatten(1))
    layer = RefConv2d(*case.args, **case.options, form="thin", map_size=case.map_size)
    assert layer.form == "full"


@pytest.mark.parametrize("change", BASES.values(), ids=BASES)
@pytest.mark.parametrize("case", THIN, ids=str)
def test_coordinates_give_the_same_weights(case: Case, change: Callable[[Tensor], Tensor]) -> None:
    basis, refocus_weights, _ = case.tensors()
    basis = change(basis)
    rotation, factor = thin.decompose(basis, case.groups, case.map_size)
    want = functional.refocus_weight(basis, refocus_weights)
    coordinates = thin.project(refocus_weights, rotation)
    got = functional.thin_refocus_weight(basis, coordinates, factor)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    back = thin.lift(coordinates, rotation, case.map_size)
    assert back.shape == refocus_weights.shape
    torch.testing.assert_close(functional.refocus_weight(basis, back), want, rtol=0, atol=1e-12)
    assert back.norm() <= refocus_weights.norm() * (1 + 1e-12)  # the smallest one


@pytest.mark.parametrize("block", [1, 40, 200, 1000, 1 << 20])
def test_blocks_of_rows_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    basis, refocus_weights = torch.randn(20, 2, 3, 3, dtype=torch.float64), torch.randn(40, 4, 3, 3).double()
    rotation, _ = thin.decompose(basis, 4, 3)
    want = torch.bmm(refocus_weights.view(10, 4, 36), rotation).view(40, 9)
    monkeypatch.setattr(thin, "_BLOCK", block)
    torch.testing.assert_close(thin.project(refocus_weights, rotation), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factor_is_rounded_once(dtype: torch.dtype) -> None:
    basis = torch.randn(24, 1, 3, 3).to(dtype)
    want = functional.refocus_factor(basis.double(), 24)
    got = functional.refocus_factor(basis, 24)
    assert got.dtype == dtype
    assert torch.equal(got, want.to(dtype))
    assert functional.refocus_factor(basis.to("meta"), 24).shape == got.shape


# --- training -----------------------------------------------------------------------------------------------


def steps(model: nn.Module, batches: Iterable[Tensor], count: int, **options: Any) -> None:
    """SGD with a schedule, clipping by norm, and gradients accumulated over two batches."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    batches = list(batches)
    for step in range(count):
        optimizer.zero_grad()
        for part in range(2):
            y = model(batches[(2 * step + part) % len(batches)])
            (y.square().mean() - y.sin().mean()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        schedule.step()


TRAINED = [
    *((case, "full rank", {}, False) for case in THIN if case.height > 1),
    *((case, "rank-deficient", {}, True) for case in THIN[:2]),
    (THIN[0], "full rank", {"identity": False}, False),
    *((OTHERS[3], "full rank", {}, nesterov) for nesterov in (False, True)),  # dense
    (THIN[0], "full rank", {}, True),
]


@pytest.mark.parametrize(("case", "kind", "options", "nesterov"), TRAINED, ids=str)
def test_200_steps_give_the_same_weights(
    case: Case, kind: str, options: dict[str, Any], nesterov: bool, backend: str
) -> None:
    conv = nn.Conv2d(*case.args, **case.options).double()
    conv.weight.data = BASES[kind](conv.weight.data)
    layers = []
    for form in ("full", "thin"):
        torch.manual_seed(1)
        layers.append(RefConv2d.from_conv(conv, form=form, map_size=case.map_size, **options))
    full, thin_layer = layers
    torch.testing.assert_close(thin_layer.weight, full.weight, rtol=0, atol=1e-13)
    start, batches = full.weight.detach(), [case.input() for _ in range(4)]
    with use_backend(backend):
        for layer in layers:
            steps(layer, batches, 200, nesterov=nesterov, weight_decay=1e-2)
    torch.testing.assert_close(thin_layer.weight, full.weight, rtol=0, atol=1e-12)
    assert (full.weight - start).abs().max() > 0.01


def test_averaged_sgd_is_exact_too() -> None:
    conv, x, weights = nn.Conv2d(8, 8, 3, groups=8).double(), torch.randn(2, 8, 6, 6).double(), []
    for form in ("full", "thin"):
        torch.manual_seed(1)
        layer = RefConv2d.from_conv(conv, form=form)
        optimizer = torch.optim.ASGD([p for p in layer.parameters() if p.requires_grad], lr=1e-4, t0=3)
        for _ in range(50):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
        weights.append(layer.weight.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-11)


def test_adam_is_another_model() -> None:
    """What the warning is for: without it this would be silent."""
    conv, x, weights = nn.Conv2d(8, 8, 3, groups=8).double(), torch.randn(2, 8, 6, 6).double(), []
    for form in ("full", "thin"):
        torch.manual_seed(1)
        layer = RefConv2d.from_conv(conv, form=form)
        optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.01)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(3):
                optimizer.zero_grad()
                layer(x).square().sum().backward()
                optimizer.step()
        weights.append(layer.weight.detach())
    assert (weights[0] - weights[1]).abs().max() > 1e-3


def test_gradient_norms_are_equal() -> None:
    conv = nn.Conv2d(12, 12, 3, groups=12).double()
    norms = []
    for form in ("full", "thin"):
        torch.manual_seed(1)
        layer = RefConv2d.from_conv(conv, form=form)
        layer(torch.linspace(-1, 1, 12 * 64).double().view(1, 12, 8, 8)).square().sum().backward()
        norms.append(layer.transform.weight.grad.norm())
    torch.testing.assert_close(*norms, rtol=1e-14, atol=0)


def test_a_whole_mobilenet() -> None:
    """All layers of MobileNetV2, float64, a few steps; docs/numerics.md has 200, and says why BatchNorm is frozen."""
    torch.manual_seed(0)
    plain = MobileNetV2().double().eval()
    models = []
    for form in ("full", "thin"):
        torch.manual_seed(1)
        models.append(refocus(plain, form=form))
    batches = [torch.randn(2, 3, 32, 32, dtype=torch.float64) for _ in range(2)]
    for model in models:
        steps(model, batches, 2, nesterov=True, weight_decay=4e-5)
    full, thin_model = ({n: m for n, m in model.named_modules() if isinstance(m, RefConv2d)} for model in models)
    assert sum(layer.form == "thin" for layer in thin_model.values()) == 17
    for name, layer in full.items():
        torch.testing.assert_close(thin_model[name].weight, layer.weight, rtol=0, atol=1e-12)
    trained = sum(p.numel() for p in models[1].parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in plain.parameters())


def test_float32_differs_like_another_order_of_summation() -> None:
    """The full form on its reference path and on the thin form's coordinates, against the full form in other orders."""
    case = replace(DEPTHWISE[0], in_channels=48, out_channels=48, groups=48)
    conv = nn.Conv2d(*case.args, **case.options)
    batches = [case.input(torch.float32) for _ in range(4)]

    def weights(form: str, permutation: Tensor | None, dtype: torch.dtype) -> Tensor:
        torch.manual_seed(1)
        layer = RefConv2d.from_conv(conv, form=form, init="zeros").to(dtype)
        with use_backend("reference"):
            if permutation is None:
                steps(layer, [x.to(dtype) for x in batches], 50)
                return layer.weight.detach().double()
            # The same network with its channels in another order: every sum of Eq. 1 is taken in that order.
            layer.basis_weight.data = layer.basis_weight.data[permutation]
            layer.bias.data = layer.bias.data[permutation]
            steps(layer, [x[:, permutation].to(dtype) for x in batches], 50)
            return layer.weight.detach().double()[permutation.argsort()]

    exact = weights("full", None, torch.float64)
    orders = [weights("full", torch.randperm(48), torch.float32) for _ in range(5)]
    spread = max((a - exact).abs().max() for a in orders)
    assert (weights("thin", None, torch.float32) - exact).abs().max() <= 2 * spread


# --- initialisation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["xavier", "kaiming", "xavier_grouped", "zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", THIN, ids=str)
def test_same_seed_same_weights(case: Case, dtype: torch.dtype, init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin, "_BLOCK", 300)  # several blocks of rows
    conv = nn.Conv2d(*case.args, **case.options, dtype=dtype)
    layers = []
    for form in ("full", "thin"):
        torch.manual_seed(7)
        options = {"form": form, "map_size": case.map_size, "init": init}
        layers.append(
            (RefConv2d.from_conv(conv, **options), RefConv2d(*case.args, **case.options, **options, dtype=dtype))
        )
    for full, thin_layer in zip(*layers, strict=True):
        tolerance = 20 * torch.finfo(dtype).eps * max(1.0, full.weight.abs().max().item())
        torch.testing.assert_close(thin_layer.weight, full.weight, rtol=0, atol=tolerance)


def test_gaussian_coordinates() -> None:
    basis = torch.randn(400, 1, 3, 3)
    for init, form in (("xavier_normal", "full"), ("xavier_normal", "thin"), ("xavier", "thin")):
        conv = nn.Conv2d(400, 400, 3, groups=400, bias=False)
        conv.weight.data = basis
        weight = RefConv2d.from_conv(conv, form=form, init=init).transform.weight.detach()
        std = (2 / (9 * 400 + 9 * 400)) ** 0.5  # Xavier's, of W_r; a rotation keeps it
        assert weight.std().item() == pytest.approx(std, rel=0.05)
        assert abs(weight.mean().item()) < 0.1 * std
