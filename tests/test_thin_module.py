"""``RefConv2d(form="thin")``: construction, state, loading, folding, caching."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from refconv_kernels import RefConv2d, ThinRefocusingTransformation, functional, refocus, reparameterize, use_backend
from tests.cases import Case
from tests.test_thin import THIN

ALL_CASES = pytest.mark.parametrize("case", THIN, ids=str)


def layer_of(case: Case) -> RefConv2d:
    layer = RefConv2d(*case.args, **case.options, map_size=case.map_size, form="thin")
    assert layer.form == "thin"
    return layer


def thin() -> RefConv2d:
    return RefConv2d(4, 4, 3, padding=1, groups=4, form="thin")


# --- what it computes ---------------------------------------------------------------------------------------


@ALL_CASES
def test_forward_is_the_functional(case: Case, backend: str) -> None:
    layer, x = layer_of(case), case.input(torch.float32)
    transform = layer.transform
    options = {k: v for k, v in case.options.items() if k != "bias"}
    with use_backend(backend):
        weights = layer.basis_weight, transform.weight, transform.factor
        assert torch.equal(layer(x), functional.thin_refconv2d(x, *weights, layer.bias, **options))
        assert torch.equal(layer.weight, functional.thin_refocus_weight(*weights))
        assert torch.equal(layer.weight, transform(layer.basis_weight))


@ALL_CASES
def test_as_many_trained_numbers_as_the_plain_convolution(case: Case) -> None:
    layer, conv = layer_of(case), nn.Conv2d(*case.args, **case.options)
    trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in conv.parameters())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # PyTorch's, of the folded convolution
@ALL_CASES
def test_fold(case: Case) -> None:
    layer, x = layer_of(case), case.input(torch.float32)
    conv = layer.fuse()
    assert torch.equal(conv.weight, layer.weight)
    torch.testing.assert_close(conv(x), layer(x))


def test_zero_coordinates_are_the_plain_convolution_bit_for_bit(backend: str) -> None:
    conv = nn.Conv2d(4, 4, 3, groups=4)
    with use_backend(backend):
        assert torch.equal(RefConv2d.from_conv(conv, form="thin", init="zeros").weight, conv.weight)
        assert not RefConv2d.from_conv(conv, form="thin", init="zeros", identity=False).weight.any()


def test_a_hook_on_the_transformation_is_called() -> None:
    layer, calls = thin(), []
    want = layer(torch.ones(1, 4, 5, 5))
    layer.transform.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(layer(torch.ones(1, 4, 5, 5)), want)
    assert calls == [1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types(dtype: torch.dtype) -> None:
    layer, x = thin(), torch.randn(2, 4, 6, 6)
    want = layer(x)
    other = copy.deepcopy(layer).to(dtype)
    assert {t.dtype for t in other.state_dict().values()} == {dtype}
    tolerance = 1e-5 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(other(x.to(dtype)).float(), want, rtol=tolerance, atol=tolerance)
    factor = functional.refocus_factor(nn.Conv2d(4, 4, 3, groups=4, dtype=dtype).weight, 4)
    assert RefConv2d(4, 4, 3, groups=4, form="thin", dtype=dtype).transform.factor.dtype == factor.dtype == dtype


def test_transformed_weight_is_kept_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = thin().eval(), []
    forward = ThinRefocusingTransformation.forward
    monkeypatch.setattr(ThinRefocusingTransformation, "forward", lambda self, b: calls.append(1) or forward(self, b))
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)
        assert len(calls) == 1
        layer.transform.factor.mul_(2)
        assert not torch.equal(layer(x), first)
        layer.transform.weight.zero_()
        torch.testing.assert_close(layer(x), functional.conv2d(x, layer.basis_weight, layer.bias, 1, 1, groups=4))
    assert len(calls) == 3


# --- construction -------------------------------------------------------------------------------------------


def test_repr() -> None:
    layer = RefConv2d(6, 6, 5, groups=6, map_size=5, form="thin", init="zeros", identity=False)
    text = "ThinRefocusingTransformation(6, 6, map_size=5, init='zeros', identity=False)"
    assert repr(layer.transform) == text


def test_meta_device_and_reset() -> None:
    layer = RefConv2d(4, 8, 3, groups=4, form="thin", device="meta")
    assert layer.transform.factor.shape == (2, 9, 9)
    assert layer(torch.empty(1, 4, 5, 5, device="meta")).shape == (1, 8, 3, 3)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.equal(layer.transform.factor, functional.refocus_factor(layer.basis_weight, 4))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.reset_parameters()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_follows_to_and_is_never_trained(device: str) -> None:
    layer = thin().to(device)
    assert layer.transform.factor.device.type == device
    assert not layer.transform.factor.requires_grad
    assert not layer.requires_grad_(True).transform.factor.requires_grad
    assert [name for name, _ in layer.named_buffers()] == ["transform.factor"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "ones"}, r"init \(='ones'\) must be one of"),
        ({"map_size": 2}, r"map_size \(=2\) must be a positive odd int"),
        ({"group_size": 4}, r"basis has 6 2-D kernels, which groups \(=4\) must divide"),
        ({"basis": torch.randn(6, 3, 3)}, r"basis.shape \(=\(6, 3, 3\)\) must be"),
    ],
)
def test_errors_of_the_transformation(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThinRefocusingTransformation(**{"basis": torch.randn(6, 1, 3, 3), "group_size": 6, **arguments})


def test_form_describes_the_default_transformation() -> None:
    with pytest.raises(ValueError, match=r"form \(='thin'\), .* leave them out when transform is given"):
        RefConv2d(4, 4, 3, form="thin", transform=nn.Identity())
    assert RefConv2d(4, 4, 3, transform=nn.Identity()).form is None


# --- state --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign: bool) -> None:
    one, two = thin(), thin()
    assert list(one.state_dict()) == ["basis_weight", "bias", "transform.weight", "transform.factor"]
    two.load_state_dict(one.state_dict(), assign=assign)
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(one(x), two(x))
    assert torch.equal(one.transform.factor, two.transform.factor)


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in names}


@pytest.mark.parametrize("assign", [False, True])
def test_factor_is_rebuilt_where_it_was_not_saved(assign: bool) -> None:
    one, two = thin(), thin()
    two.load_state_dict(without(one.state_dict(), "transform.factor"), assign=assign)
    assert torch.equal(two.transform.factor, one.transform.factor)
    outer = nn.Sequential(thin())
    outer.load_state_dict({f"0.{k}": v for k, v in without(one.state_dict(), "transform.factor").items()})
    assert torch.equal(outer[0].transform.factor, one.transform.factor)
    wide = thin().double()
    wide.load_state_dict(without(one.state_dict(), "transform.factor"), assign=assign)
    want = one.basis_weight if assign else one.basis_weight.double()
    assert torch.equal(wide.transform.factor, functional.refocus_factor(want, 4))


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_convolution_loads_straight_in(assign: bool) -> None:
    conv, layer = nn.Conv2d(4, 4, 3, groups=4), thin()
    coordinates = layer.transform.weight.detach().clone()
    layer.load_state_dict(conv.state_dict(), assign=assign)
    assert torch.equal(layer.basis_weight, conv.weight)
    assert torch.equal(layer.transform.weight, coordinates)
    assert torch.equal(layer.transform.factor, functional.refocus_factor(conv.weight, 4))


def test_a_failed_load_changes_nothing() -> None:
    layer, full = thin(), RefConv2d(4, 4, 3, groups=4)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for state in (full.state_dict(), {"basis_weight": torch.zeros(4, 1, 3, 3)}, without(layer.state_dict(), "bias")):
        with pytest.raises(RuntimeError, match=r"another|other form|all zeros|Missing key"):
            layer.load_state_dict({name: tensor + (name == "basis_weight") * tensor for name, tensor in state.items()})
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_copies() -> None:
    layer, x = thin(), torch.randn(1, 4, 5, 5)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), layer(x))
        assert copied.transform.factor is not layer.transform.factor


# --- networks -----------------------------------------------------------------------------------------------


def test_a_network_and_back() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    model = refocus(plain, form="thin", init="zeros")
    assert [m.form for m in model.modules() if isinstance(m, RefConv2d)] == ["full", "thin"]
    folded = reparameterize(model)
    assert all(torch.equal(tensor, folded.state_dict()[name]) for name, tensor in plain.state_dict().items())
