"""What PyTorch's own suite demands of ``nn.Conv2d``, demanded of ``RefConv2d`` with ``W_t = W_b``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refconv_kernels import RefConv2d, functional, use_backend
from tests.cases import CASES, Case
from tests.conftest import needs_native

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def trained_like(conv: nn.Conv2d) -> RefConv2d:
    """A layer with ``W_t = W_b``, all of whose parameters are trained."""
    small = min(conv.kernel_size) < 3
    return RefConv2d.from_conv(conv, init="zeros", basis="trainable", map_size=1 if small else 3)


def gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients of input, kernel and bias."""
    x = x.clone().requires_grad_()
    kernel = module.basis_weight if isinstance(module, RefConv2d) else module.weight
    leaves = [x, kernel] + ([module.bias] if module.bias is not None else [])
    y = module(x)
    return y, list(torch.autograd.grad(y.square().sum() + y.sum(), leaves))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward_are_those_of_nn_conv2d(case: Case, layout: torch.memory_format) -> None:
    conv = nn.Conv2d(*case.args, **case.options).double().to(memory_format=layout)
    x = case.input().contiguous(memory_format=layout)
    want, want_grads = gradients(conv, x)
    got, got_grads = gradients(trained_like(conv), x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got_grads, want_grads, rtol=1e-10, atol=1e-10)
    if want.numel() and min(want.shape) > 1:
        assert got.is_contiguous(memory_format=layout) == want.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("bias", [True, False])
def test_groups_are_separate_convolutions(bias: bool, backend: str) -> None:
    layer = RefConv2d(4, 6, 3, groups=2, bias=bias).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    with use_backend(backend):
        y = layer(x)
        halves = []
        for n in range(2):
            half_bias = layer.bias[3 * n : 3 * n + 3] if bias else None
            halves.append(F.conv2d(x[:, 2 * n : 2 * n + 2], layer.weight[3 * n : 3 * n + 3], half_bias))
    want = torch.cat(halves, 1)
    torch.testing.assert_close(y, want)
    cotangent = torch.randn_like(want)
    torch.testing.assert_close(torch.autograd.grad(y, x, cotangent), torch.autograd.grad(want, x, cotangent))


@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_depthwise_multiplier_is_one_convolution_per_channel(multiplier: int, backend: str) -> None:
    layer = RefConv2d(3, 3 * multiplier, 3, padding=1, groups=3).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    with use_backend(backend):
        y = layer(x)
    parts = [
        F.conv2d(
            x[:, c : c + 1], *(t[c * multiplier : (c + 1) * multiplier] for t in (layer.weight, layer.bias)), padding=1
        )
        for c in range(3)
    ]
    want = torch.cat(parts, 1)
    torch.testing.assert_close(y, want)
    cotangent = torch.randn_like(want)
    got_grads = torch.autograd.grad(y, [x, layer.transform.weight, layer.bias], cotangent)
    want_grads = torch.autograd.grad(want, [x, layer.transform.weight, layer.bias], cotangent)
    torch.testing.assert_close(got_grads, want_grads)


def test_noncontiguous_basis_and_gradient(backend: str) -> None:
    layer = RefConv2d(4, 4, 3, groups=4).double()
    layer.basis_weight.data = layer.basis_weight.data.transpose(2, 3)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    with use_backend(backend):
        y = layer(x)
        strided = torch.randn(2, 4, 4, 8, dtype=torch.float64)[..., ::2]
        got = torch.autograd.grad(y, [x, layer.transform.weight], strided)
        want = torch.autograd.grad(layer(x), [x, layer.transform.weight], strided.contiguous())
        expanded = torch.autograd.grad(layer(x).sum(), x)  # a cotangent with strides 0
        ones = torch.autograd.grad(layer(x), x, torch.ones_like(y))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(expanded, ones)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_unbatched_is_a_batch_of_one(groups: int, backend: str) -> None:
    layer = RefConv2d(4, 4, 3, stride=2, padding=1, groups=groups)
    x = torch.randn(4, 7, 6, requires_grad=True)
    with use_backend(backend):
        one, batch = layer(x), layer(x[None])
    assert one.shape == batch.shape[1:]
    torch.testing.assert_close(one, batch[0])
    one.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_empty_batch_has_zero_gradients(groups: int, backend: str) -> None:
    layer = RefConv2d(4, 4, 3, groups=groups)
    x = torch.randn(0, 4, 6, 6, requires_grad=True)
    with use_backend(backend):
        y = layer(x)
    assert y.shape == (0, 4, 4, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not layer.transform.weight.grad.any()
    assert not layer.bias.grad.any()


def test_same_and_valid_padding() -> None:
    x = torch.randn(1, 4, 9, 8)
    for kernel, dilation in ((3, 1), (3, 2), (4, 1), (5, 3), ((4, 3), (1, 2))):
        layer = RefConv2d(4, 4, kernel, padding="same", dilation=dilation, groups=4)
        total = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        padded = F.pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))
        torch.testing.assert_close(layer(x), F.conv2d(padded, layer.weight, layer.bias, 1, 0, dilation, 4))
        assert layer(x).shape == x.shape
    valid = RefConv2d(4, 4, 3, padding="valid", groups=4)
    torch.testing.assert_close(valid(x), F.conv2d(x, valid.weight, valid.bias, groups=4))


def test_padding_of_reflect_beyond_the_input_raises_as_in_pytorch() -> None:
    with pytest.raises(RuntimeError, match="Padding size should be less than the corresponding input dimension"):
        RefConv2d(2, 2, 3, padding=5, padding_mode="reflect")(torch.randn(1, 2, 4, 4))


def test_large_kernel_of_31(backend: str) -> None:
    layer = RefConv2d(2, 2, 31, padding=15, groups=2).double()
    x = torch.randn(1, 2, 12, 35, dtype=torch.float64)
    with use_backend(backend):
        torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, 1, 15, 1, 2))


@needs_native
def test_convolutions_that_are_known_are_still_told_apart() -> None:
    """What was checked once is looked up; autocast, errors and unbatched input are not part of what is known."""
    x, weight, options = torch.randn(2, 8, 9, 9), torch.randn(8, 1, 3, 3), {"padding": 1, "groups": 8}
    expected = functional.conv2d(x, weight, **options)
    assert torch.equal(functional.conv2d(x, weight, **options), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.conv2d(x, weight, **options).dtype == torch.bfloat16
    assert torch.equal(functional.conv2d(x[0], weight, **options), expected[0])
    around = functional.conv2d(x, weight, padding_mode="circular", **options)
    torch.testing.assert_close(around[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])  # by another kernel
    assert not torch.allclose(around, expected)
    with pytest.raises(ValueError, match=r"bias.shape \(=\(7,\)\)"):
        functional.conv2d(x, weight, torch.randn(7), **options)
    for stride in (1.0, (1, 1.0)):
        with pytest.raises(ValueError, match="stride"):
            functional.conv2d(x, weight, None, stride, **options)
    with use_backend("reference"):
        torch.testing.assert_close(functional.conv2d(x, weight, **options), expected)
