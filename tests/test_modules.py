"""``RefConv2d``: what it computes, construction, folding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from refconv_kernels import RefConv2d, functional, use_backend
from tests.cases import CASES, Case

ALL_CASES = pytest.mark.parametrize("case", CASES, ids=str)


def layer_of(case: Case, **options: Any) -> RefConv2d:
    return RefConv2d(*case.args, **case.options, map_size=case.map_size, **options)


# --- what it computes ---------------------------------------------------------------------------------------


@ALL_CASES
def test_zero_refocusing_weights_are_the_plain_convolution_bit_for_bit(case: Case) -> None:
    layer, x = layer_of(case, init="zeros"), case.input(torch.float32)
    with use_backend("reference"):
        got = layer(x)
        options = {k: v for k, v in case.options.items() if k != "bias"}
        assert torch.equal(got, functional.conv2d(x, layer.basis_weight, layer.bias, **options))


@ALL_CASES
def test_forward_is_the_functional(case: Case, backend: str) -> None:
    layer, x = layer_of(case), case.input(torch.float32)
    options = {k: v for k, v in case.options.items() if k != "bias"}
    with use_backend(backend):
        want = functional.refconv2d(x, layer.basis_weight, layer.transform.weight, layer.bias, **options)
        assert torch.equal(layer(x), want)
        assert torch.equal(layer.weight, functional.refocus_weight(layer.basis_weight, layer.transform.weight))


def test_without_identity() -> None:
    layer = RefConv2d(4, 4, 3, groups=4, init="zeros", identity=False)
    assert not layer.weight.any()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_shape_of_the_refocusing_weights(groups: int) -> None:
    layer = RefConv2d(4, 8, 5, groups=groups, map_size=5)
    assert layer.transform.weight.shape == (8 * 4 // groups, groups, 5, 5)
    assert layer.basis_weight.shape == nn.Conv2d(4, 8, 5, groups=groups).weight.shape


def test_frozen_and_trainable_basis() -> None:
    assert not RefConv2d(3, 3, 3).basis_weight.requires_grad
    layer = RefConv2d(3, 3, 3, basis="trainable")
    assert layer.basis_weight.requires_grad
    assert "basis='trainable'" in repr(layer)
    assert not layer.requires_grad_(False).basis_weight.requires_grad


def test_requires_grad_reaches_every_parameter() -> None:
    layer = RefConv2d(3, 3, 3).requires_grad_(False)
    assert not layer(torch.randn(1, 3, 5, 5)).requires_grad
    layer.requires_grad_(True)
    layer(torch.randn(1, 3, 5, 5)).sum().backward()
    assert layer.basis_weight.grad is not None  # as for any module: a frozen basis is the initial state of a flag


def test_custom_transform() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(3.0))

        def forward(self, basis: Tensor) -> Tensor:
            return self.scale * basis

    layer = RefConv2d(3, 4, 1, transform=Scale())
    assert torch.equal(layer.weight, 3 * layer.basis_weight)
    layer(torch.randn(1, 3, 5, 5)).sum().backward()
    assert layer.transform.scale.grad is not None
    assert torch.equal(layer.fuse().weight, layer.weight)


def test_custom_transform_must_keep_shape_and_dtype() -> None:
    layer = RefConv2d(3, 4, 3, transform=nn.Flatten())
    with pytest.raises(
        ValueError, match=r"transform returned \(4, 27\), torch.float32, but must keep .* \(4, 3, 3, 3\)"
    ):
        layer(torch.randn(1, 3, 5, 5))


def test_half_precision_layers(backend: str) -> None:
    layer = RefConv2d(4, 4, 3, padding=1, groups=4)
    x = torch.randn(2, 4, 6, 6)
    if backend != "reference":
        backend = "auto"  # a named backend refuses what its kernels do not cover
    with use_backend(backend):
        want = layer(x)
        for dtype in (torch.bfloat16, torch.float16):
            got = copy.deepcopy(layer).to(dtype)(x.to(dtype))
            assert got.dtype == dtype
            torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


# --- construction -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((0, 4, 3), {}, ValueError, r"in_channels \(=0\) must be a positive int"),
        ((4, 2.0, 3), {}, ValueError, r"out_channels \(=2.0\) must be a positive int"),
        ((4, 6, 3), {"groups": 4}, ValueError, r"out_channels \(=6\) must be divisible by groups \(=4\)"),
        ((6, 4, 3), {"groups": 4}, ValueError, r"in_channels \(=6\) must be divisible by groups \(=4\)"),
        ((4, 4, 3), {"groups": 0}, ValueError, r"groups \(=0\) must be a positive int"),
        ((4, 4, 0), {}, ValueError, r"kernel_size \(=0\) must be an int of at least 1"),
        ((4, 4, (3, 3, 3)), {}, ValueError, r"kernel_size \(=\(3, 3, 3\)\) must be an int of at least 1, or two"),
        ((4, 4, 3), {"stride": 0}, ValueError, r"stride \(=0\) must be"),
        ((4, 4, 3), {"dilation": -1}, ValueError, r"dilation \(=-1\) must be"),
        ((4, 4, 3), {"padding": -1}, ValueError, r"padding \(=-1\) must be an int of at least 0"),
        ((4, 4, 3), {"padding": "bad"}, ValueError, r"padding \(='bad'\) must be 'same', 'valid'"),
        ((4, 4, 3), {"padding": "same", "stride": 2}, ValueError, r"padding='same' needs stride 1"),
        ((4, 4, 3), {"padding_mode": "bad"}, ValueError, r"padding_mode \(='bad'\) must be one of"),
        ((4, 4, 3), {"map_size": 2}, ValueError, r"map_size \(=2\) must be a positive odd int"),
        ((4, 4, 3), {"map_size": 5}, ValueError, r"map_size \(=5\) must be at most the kernel_size \(=\(3, 3\)\)"),
        ((4, 4, (1, 7)), {}, ValueError, r"map_size \(=3\) must be at most the kernel_size \(=\(1, 7\)\)"),
        ((4, 4, 3), {"form": "thick"}, ValueError, r"form \(='thick'\) must be one of \('full', 'thin'\)"),
        ((4, 4, 3), {"init": "ones"}, ValueError, r"init \(='ones'\) must be one of"),
        ((4, 4, 3), {"basis": "loose"}, ValueError, r"basis \(='loose'\) must be one of \('frozen', 'trainable'\)"),
        ((4, 4, 3), {"transform": abs}, TypeError, r"transform \(=<built-in function abs>\) must be a torch.nn.Module"),
        ((4, 4, 3), {"transform": nn.Identity(), "map_size": 1}, ValueError, r"map_size \(=1\), .* leave them out"),
    ],
)
def test_construction_errors(
    args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        RefConv2d(*args, **options)


def test_attributes_are_those_of_nn_conv2d() -> None:
    conv = nn.Conv2d(4, 8, (3, 5), (2, 1), (1, 2), (1, 2), 2, False, "reflect")
    layer = RefConv2d(4, 8, (3, 5), (2, 1), (1, 2), (1, 2), 2, False, "reflect")
    for name in [*nn.Conv2d.__constants__, "kernel_size", "bias", "transposed", "output_padding", "training"]:
        assert getattr(layer, name) == getattr(conv, name), name
    assert layer.weight.shape == conv.weight.shape
    text = "4, 8, kernel_size=(3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, padding_mode='reflect', bias=False"
    assert layer.extra_repr() == text


def test_device_and_dtype(device: str) -> None:
    layer = RefConv2d(4, 4, 3, groups=4, device=device, dtype=torch.float64)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert {p.device.type for p in layer.parameters()} == {device}
    x = torch.randn(1, 4, 5, 5, device=device, dtype=torch.float64)
    torch.testing.assert_close(layer(x).cpu(), layer.cpu()(x.cpu()))
    meta = RefConv2d(4, 4, 3, device="meta")
    assert meta(torch.randn(1, 4, 5, 5, device="meta")).is_meta
    assert meta.to_empty(device="cpu").basis_weight.device.type == "cpu"


def test_initial_basis_and_bias_are_those_of_nn_conv2d() -> None:
    layer = RefConv2d(4, 8, 3)
    bound = 1 / 6  # 1 / sqrt(4 * 3 * 3)
    assert 0.9 * bound < layer.basis_weight.abs().max() <= bound
    assert 0 < layer.bias.abs().max() <= bound
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.reset_parameters()
    assert all(not torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_errors_in_use_name_the_argument() -> None:
    layer = RefConv2d(4, 4, 3, groups=4)
    with pytest.raises(ValueError, match="input has 3 channels"):
        layer(torch.randn(1, 3, 5, 5))
    with pytest.raises(TypeError, match="input.dtype"):
        layer(torch.randn(1, 4, 5, 5).double())
    with pytest.raises(TypeError, match=r"input \(=None\) must be a torch.Tensor"):
        layer(None)


# --- weight is read-only ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.randn(4, 1, 3, 3), nn.Parameter(torch.randn(4, 1, 3, 3)), None])
def test_writing_to_weight_says_fold_first(value: Any) -> None:
    layer = RefConv2d(4, 4, 3, groups=4)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(AttributeError, match="cannot be set: fold first"):
        layer.weight = value
    with pytest.raises(KeyError, match="weight"):
        layer.register_parameter("weight", nn.Parameter(torch.zeros(1)))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_fusing_a_batchnorm_into_an_unfolded_layer_says_fold_first() -> None:
    layer, norm = RefConv2d(4, 4, 3, groups=4).eval(), nn.BatchNorm2d(4).eval()
    with pytest.raises(AttributeError, match="fold first"):
        nn.utils.fusion.fuse_conv_bn_eval(layer, norm)
    fused = nn.utils.fusion.fuse_conv_bn_eval(layer.fuse(), norm)
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(fused(x), norm(layer(x)))


# --- from_conv and fuse -------------------------------------------------------------------------------------


@ALL_CASES
def test_from_conv_and_back(case: Case) -> None:
    conv = nn.Conv2d(*case.args, **case.options)
    layer = RefConv2d.from_conv(conv, map_size=case.map_size, init="zeros")
    back = layer.fuse()
    assert type(back) is nn.Conv2d
    assert repr(back) == repr(conv)
    assert {k: getattr(back, k) for k in nn.Conv2d.__constants__} == {
        k: getattr(conv, k) for k in nn.Conv2d.__constants__
    }
    assert list(back.state_dict()) == list(conv.state_dict())
    assert torch.equal(back.weight, conv.weight)
    assert case.bias is False or torch.equal(back.bias, conv.bias)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # PyTorch's, of the folded convolution
@ALL_CASES
def test_fuse_is_the_same_function(case: Case) -> None:
    layer, x = layer_of(case), case.input(torch.float32)
    conv = layer.fuse()
    assert torch.equal(conv.weight, layer.weight)
    assert conv.weight.is_leaf
    torch.testing.assert_close(conv(x), layer(x))


def test_from_conv_copies() -> None:
    conv = nn.Conv2d(4, 4, 3, groups=4)
    layer = RefConv2d.from_conv(conv)
    with torch.no_grad():
        conv.weight.zero_(), conv.bias.zero_()
    assert layer.basis_weight.any()
    assert layer.bias.any()
    folded = RefConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=4)).fuse()
    assert folded.weight.data_ptr() != layer.basis_weight.data_ptr()
    identity = RefConv2d(3, 3, 3, transform=nn.Identity())
    assert identity.fuse().weight.data_ptr() != identity.basis_weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_fold_in_float32_and_cast_back(dtype: torch.dtype) -> None:
    layer = RefConv2d(16, 16, 3, groups=16).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    want = functional.refocus_weight(layer.basis_weight.to(wide), layer.transform.weight.to(wide)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        conv = layer.fuse()
    assert conv.weight.dtype == conv.bias.dtype == dtype
    assert torch.equal(conv.weight, want)


def test_layout_mode_flags_and_hooks_return() -> None:
    conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last).eval()
    conv.weight.requires_grad_(False)
    conv.bias.requires_grad_(False)
    calls = []
    handle = conv.register_forward_hook(lambda *_: calls.append("hook"))
    layer = RefConv2d.from_conv(conv)
    assert layer.basis_weight.stride() == conv.weight.stride()
    assert not layer.training
    assert not layer.transform.training
    layer(torch.randn(1, 4, 5, 5))
    back = layer.fuse()
    back(torch.randn(1, 4, 5, 5))
    assert calls == ["hook", "hook"]
    assert back.weight.stride() == conv.weight.stride()
    assert not back.training
    assert not back.weight.requires_grad
    assert not back.bias.requires_grad
    handle.remove()
    assert RefConv2d.from_conv(nn.Conv2d(3, 3, 3)).fuse().weight.requires_grad


def test_from_conv_errors() -> None:
    class Padded(nn.Conv2d):
        pass

    with pytest.raises(TypeError, match=r"conv \(=Padded\) must be exactly torch.nn.Conv2d"):
        RefConv2d.from_conv(Padded(3, 3, 3))
    with pytest.raises(TypeError, match=r"conv \(=Linear\)"):
        RefConv2d.from_conv(nn.Linear(3, 3))
    zero = nn.Conv2d(3, 3, 3)
    nn.init.zeros_(zero.weight)
    with pytest.raises(ValueError, match=r"conv.weight is all zeros"):
        RefConv2d.from_conv(zero)
    with pytest.raises(ValueError, match=r"map_size \(=3\) must be at most the kernel_size \(=\(1, 1\)\)"):
        RefConv2d.from_conv(nn.Conv2d(3, 3, 1))


class _Halved(nn.Module):
    def forward(self, tensor: Tensor) -> Tensor:
        return tensor / 2


@pytest.mark.parametrize("form", ["full", "thin"])
@pytest.mark.parametrize("name", ["basis_weight", "bias", "transform.weight"])
def test_parametrized_tensors(name: str, form: str) -> None:
    layer = RefConv2d(8, 8, 3, padding=1, groups=8, form=form)
    with torch.no_grad():
        layer.transform.weight.normal_()
    halved = copy.deepcopy(layer)
    owner, _, leaf = name.rpartition(".")
    register_parametrization(layer.get_submodule(owner), leaf, _Halved())
    with torch.no_grad():
        halved.get_parameter(name).div_(2)
    x = torch.randn(2, 8, 5, 5)
    for training in (True, False):
        torch.testing.assert_close(layer.train(training)(x), halved.train(training)(x))
