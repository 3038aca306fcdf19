"""The variants of Table VII inside layers and networks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from refconv_kernels import refocus, reparameterize, summary, use_backend, variant
from tests.test_variants import PROBLEMS, every_variant, layer_with, plain
from tests.tolerances import assert_close


@every_variant
def test_inside_a_layer(name: str) -> None:
    case = PROBLEMS[3]
    layer, x = layer_with(name, case), case.input(torch.float32)
    geometry = (case.stride, case.padding, case.dilation, case.groups)
    want = F.conv2d(x, plain(name, layer.basis_weight, dict(layer.transform.named_parameters())), layer.bias, *geometry)
    assert_close(layer(x), want.double(), 200)
    torch.testing.assert_close(layer.fuse()(x), want)

    other = layer_with(name, case)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), layer(x))

    before = {key: value.clone() for key, value in copied.state_dict().items()}
    copied.reset_parameters()
    assert all(not torch.equal(value, before[key]) for key, value in copied.state_dict().items())
    assert torch.equal(other(x), layer(x))  # a copy shares nothing


@every_variant
def test_kept_in_eval_mode_until_a_parameter_changes(name: str) -> None:
    case = PROBLEMS[3]
    layer, x = layer_with(name, case).eval(), case.input(torch.float32)
    calls: list[nn.Module] = []
    layer.transform.register_forward_hook(lambda module, *_: calls.append(module))
    with torch.no_grad():
        layer(x)
        layer(x)
        assert len(calls) == 1
        for parameter in layer.transform.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))  # not a multiple: attention could be blind to one
            got = layer(x)
            torch.testing.assert_close(got, layer.fuse()(x))


@every_variant
def test_networks(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, (3, 5), groups=8), nn.Conv2d(8, 4, 1))
    refocused = refocus(model, transform=lambda conv: variant(name, conv))
    x = torch.randn(2, 3, 9, 9)
    folded = reparameterize(refocused)
    torch.testing.assert_close(folded(x), refocused(x))
    assert list(folded.state_dict()) == list(model.state_dict())

    result = summary(refocused)
    assert [row.form for row in result.layers] == [None, None]
    assert result.deployed_parameters == sum(p.numel() for p in model.parameters())
    assert result.training_parameters == sum(p.numel() for p in refocused.parameters() if p.requires_grad)
    assert all(row.transform in str(result) for row in result.layers)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # PyTorch's compiler, about its own code
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
@every_variant
def test_compile_fullgraph(name: str, backend: str) -> None:
    torch.compiler.reset()
    case = PROBLEMS[0]
    layer, x = layer_with(name, case), case.input(torch.float32)
    other = copy.deepcopy(layer)
    with use_backend(backend):
        want, got = layer(x), torch.compile(other, backend="aot_eager", fullgraph=True)(x)
        want.square().sum().backward()
        got.square().sum().backward()
    torch.testing.assert_close(got, want)
    for mine, theirs in zip(other.transform.parameters(), layer.transform.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
