"""The autograd Functions in C++ against those in Python: the same bits, and the same about everything around them."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from refconv_kernels import functional, refocus, use_backend
from refconv_kernels.autograd import native
from refconv_kernels.backends import cpu

pytestmark = pytest.mark.skipif(native.unavailable is not None, reason=f"no Functions in C++: {native.unavailable}")

Call = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


class Counter:
    """Stands before the C++ module and counts the calls that it made."""

    def __init__(self, module: Any) -> None:
        self.module, self.made = module, 0
        self.remember = module.remember

    def call(self, *arguments: Any) -> Tensor | None:
        output = self.module.call(*arguments)
        self.made += output is not None
        return output


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    counter = Counter(native._native)
    monkeypatch.setattr(native, "_native", counter)
    return counter


def made_by(counter: Counter, function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> int:
    before = counter.made
    function(*tensors)
    return counter.made - before


def calls(dtype: torch.dtype = torch.float64, size: int = 5) -> dict[str, Call]:
    """Every function with a bias and without, our convolution and PyTorch's; all tensors want gradients."""
    found: dict[str, Call] = {}
    for name, (inputs, outputs, groups) in {"depthwise": (8, 8, 8), "dense": (3, 4, 1), "grouped": (6, 12, 3)}.items():
        x, bias = torch.randn(2, inputs, size, size + 1, dtype=dtype), torch.randn(outputs, dtype=dtype)
        basis = torch.randn(outputs, inputs // groups, 3, 3, dtype=dtype)
        kernels = basis.shape[0] * basis.shape[1]
        w_r = torch.randn(kernels, groups, 3, 3, dtype=dtype)
        factor = functional.refocus_factor(basis, groups)
        coordinates = torch.randn(kernels, factor.shape[1], dtype=dtype)
        options: Any = {"stride": (2, 1), "padding": (1, 1), "dilation": (1, 1), "groups": groups}

        def bound(function: Callable[..., Tensor], options: Any = options) -> Callable[..., Tensor]:
            return lambda *tensors: function(*tensors, **options)

        layer, thin = bound(functional.refconv2d), bound(functional.thin_refconv2d)
        found |= {
            f"{name} layer": (layer, (x, basis, w_r)),
            f"{name} layer, bias": (layer, (x, basis, w_r, bias)),
            f"{name} thin layer": (thin, (x, basis, coordinates, factor)),
            f"{name} thin layer, bias": (thin, (x, basis, coordinates, factor, bias)),
            f"{name} weight": (functional.refocus_weight, (basis, w_r)),
            f"{name} thin weight": (functional.thin_refocus_weight, (basis, coordinates, factor)),
        }
        if groups > 1:
            convolution = bound(functional.conv2d)
            found[f"{name} convolution"] = convolution, (x, basis)
            found[f"{name} convolution, bias"] = convolution, (x, basis, bias)
    return {
        name: (function, tuple(t.clone().requires_grad_() for t in tensors))
        for name, (function, tensors) in found.items()
    }


NAMES = list(calls())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_results_are_those_of_python(name: str, dtype: torch.dtype, counter: Counter) -> None:
    function, tensors = calls(dtype)[name]
    with use_backend("auto"):
        in_python = function(*tensors)
        weights = torch.randn_like(in_python)
        expected = torch.autograd.grad(in_python, tensors, weights)
        before = counter.made
        output = function(*tensors)
        assert counter.made == before + 1
        assert torch.equal(output, in_python)
        for wanted in (tensors, tensors[:1], tensors[-1:], tensors[1:3]):
            found = torch.autograd.grad(output, wanted, weights, retain_graph=True)
            for t, grad in zip(wanted, found, strict=True):
                assert torch.equal(grad, expected[next(i for i, other in enumerate(tensors) if other is t)])


@pytest.mark.parametrize("given", [torch.float32, torch.float64], ids=str)  # autocast leaves the second alone
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_under_autocast_too(
    name: str, dtype: torch.dtype, given: torch.dtype, counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, tensors = calls(given, size=6)[name]

    def results() -> list[Tensor]:
        with torch.autocast("cpu", dtype):
            y = function(*tensors)
        torch.manual_seed(1)
        return [y, *torch.autograd.grad(y, tensors, torch.randn(y.shape).to(y.dtype))]

    with monkeypatch.context() as without:
        without.setattr(native, "_native", None)
        expected = results()
    results()
    function(*tensors)  # what is remembered says whether there is autocast, and to which type
    function(*tensors)
    before = counter.made
    got = results()
    assert counter.made == before + 1
    assert [t.dtype for t in got] == [t.dtype for t in expected]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_both_orders(name: str, counter: Counter) -> None:
    function, tensors = calls(size=4)[name]
    function(*tensors)
    assert gradcheck(function, tensors, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)
    for n in range(len(tensors)):  # each one alone: the others then need no gradient
        alone = tuple(t.detach().requires_grad_(i == n) for i, t in enumerate(tensors))
        assert gradcheck(function, alone, fast_mode=True)
        assert gradgradcheck(function, alone, fast_mode=True)


def test_a_call_is_made_in_cpp_from_the_second_on(counter: Counter) -> None:
    for size in (11, 12):  # which no other test has
        function, tensors = calls(torch.float32, size)["depthwise layer"]
        assert [made_by(counter, function, tensors) for _ in range(3)] == [0, 1, 1]
    assert made_by(counter, function, tuple(t.to(memory_format=torch.channels_last) for t in tensors)) == 0
    assert made_by(counter, function, tuple(t.double() for t in tensors)) == 0


@pytest.mark.parametrize("function", [functional.conv2d, functional.refconv2d, functional.thin_refconv2d])
def test_numbers_lists_and_names_are_pairs(function: Callable[..., Tensor], counter: Counter) -> None:
    x, basis = torch.randn(2, 8, 14, 9), torch.randn(8, 1, 3, 5)  # a size that no other test has
    weights = {
        functional.conv2d: (basis,),
        functional.refconv2d: (basis, torch.randn(8, 8, 3, 3)),
        functional.thin_refconv2d: (basis, torch.randn(8, 15), functional.refocus_factor(basis, 8)),
    }[function]
    for pairs, *others in (
        (((2, 2), (1, 1), (1, 1)), (2, 1, 1), ([2, 2], [1, 1], [1, 1])),
        (((1, 1), (2, 4), (2, 2)), (1, "same", 2), ([1, 1], "same", [2, 2])),
        (((2, 1), (0, 0), (1, 1)), ([2, 1], "valid", 1), ((2, 1), 0, (1, 1))),
    ):
        expected, before = function(x, *weights, None, *pairs, 8), counter.made
        for geometry in (pairs, *others):
            assert torch.equal(function(x, *weights, None, *geometry, 8), expected)
        assert counter.made == before + 3
    for stride in (2.0, True, [2], (2, 2, 2), 0, None):
        with pytest.raises(ValueError, match=f"stride .={re.escape(str(stride))}. must be"):
            function(x, *weights, None, stride, 1, 1, 8)
    function(x, *weights, None, 2, (1, 2), 1, 8)
    with pytest.raises(ValueError, match="padding='same' needs stride 1"):
        function(x, *weights, None, 2, "same", 1, 8)
    with pytest.raises(ValueError, match="padding .='SAME'. must be"):
        function(x, *weights, None, 1, "SAME", 1, 8)


def test_more_padding_behind_than_before_is_left_to_python(counter: Counter) -> None:
    x, weight = torch.randn(2, 8, 14, 10), torch.randn(8, 1, 3, 4)
    expected = torch.nn.functional.conv2d(torch.nn.functional.pad(x, (1, 2, 1, 1)), weight, groups=8)
    for _ in range(2):
        torch.testing.assert_close(functional.conv2d(x, weight, padding="same", groups=8), expected)
    assert counter.made == 0


@pytest.mark.parametrize("name", NAMES)
def test_what_python_remembers_alone_is_made_in_cpp_again(
    name: str, counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, tensors = calls(torch.float32, size=13)[name]
    monkeypatch.setattr(native, "_native", None)
    function(*tensors)
    monkeypatch.setattr(native, "_native", counter)
    function(*tensors)
    assert made_by(counter, function, tensors) == 1


def test_without_gradients_there_is_no_graph(counter: Counter) -> None:
    function, tensors = calls()["depthwise layer"]
    function(*tensors)
    with torch.no_grad():
        assert not function(*tensors).requires_grad
    assert not function(*(t.detach() for t in tensors)).requires_grad
    with torch.inference_mode():
        assert function(*tensors).is_inference()
    assert counter.made >= 3


class _Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Subclass(Tensor):
    pass


def _left_to_python() -> dict[str, Callable[[Callable[..., Tensor], tuple[Tensor, ...]], object]]:
    def named(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Tensor:
        with use_backend("cpu"):
            return function(*tensors)

    def mode(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Tensor:
        with _Seen():
            return function(*tensors)

    def forward_mode(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Tensor:
        with forward_ad.dual_level():
            return function(forward_ad.make_dual(tensors[0], tensors[0]), *tensors[1:])

    return {
        "a backend named": named,
        "a mode": mode,
        "forward mode": forward_mode,
        "a subclass": lambda function, tensors: function(tensors[0].as_subclass(_Subclass), *tensors[1:]),
        "torch.func": lambda function, tensors: torch.func.grad(lambda x: function(x, *tensors[1:]).sum())(tensors[0]),
        "vmap": lambda function, tensors: torch.vmap(lambda x: function(x, *tensors[1:]))(tensors[0][None]),
        "the compiler": lambda function, tensors: torch.compile(function, backend="eager", fullgraph=True)(*tensors),
        "meta": lambda function, tensors: function(*(t.to("meta") for t in tensors)),
        "torch.jit": lambda function, tensors: torch.jit.trace(function, tensors, check_trace=False),
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")  # of torch's own
@pytest.mark.parametrize("how", _left_to_python())
def test_what_is_unusual_is_left_to_python(how: str, counter: Counter) -> None:
    function, tensors = calls(torch.float32)["depthwise layer"]
    function(*tensors)
    assert made_by(counter, function, tensors) == 1
    before = counter.made
    _left_to_python()[how](function, tensors)
    assert counter.made == before


@pytest.mark.parametrize("name", ["depthwise layer, bias", "dense weight", "depthwise convolution"])
def test_the_graph_is_one_of_pytorchs(name: str, counter: Counter) -> None:
    function, tensors = calls()[name]
    expected = torch.autograd.grad(function(*tensors).square().sum(), tensors)
    output = function(*tensors)
    twice = [torch.autograd.grad(output.square().sum(), tensors, retain_graph=True) for _ in range(2)]
    for grads in twice:
        torch.testing.assert_close(grads, expected)
    output.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.sum().backward()

    packed: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        function(*tensors)
    assert tensors[0].shape in packed
    again = checkpoint(function, *tensors, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), tensors), expected)

    scaled = tuple(t * 1 for t in tensors)
    output = function(*scaled)
    with torch.no_grad():
        scaled[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output.sum(), tensors)
    assert counter.made >= 4


def test_hooks_and_parts_of_a_graph(counter: Counter) -> None:
    function, (x, basis, w_r) = calls()["depthwise layer"]
    function(x, basis, w_r)
    seen: list[Tensor] = []
    handle = w_r.register_hook(seen.append)
    output = function(x, basis.detach(), w_r)
    output[:, :2].sum().backward()
    handle.remove()
    assert basis.grad is None
    assert len(seen) == 1
    assert torch.equal(seen[0], w_r.grad)
    assert counter.made >= 1


def test_wrong_calls_say_what_is_wrong() -> None:
    function, (x, basis, w_r) = calls()["depthwise layer"]
    function(x, basis, w_r)
    with pytest.raises(ValueError, match="input has 7 channels"):
        function(x[:, :7], basis, w_r)
    with pytest.raises(TypeError, match="input"):
        function(None, basis, w_r)
    with pytest.raises(TypeError, match="dtype"):
        function(x.float(), basis, w_r)
    with pytest.raises(ValueError, match=r"stride \(=\(0, 1\)\)"):
        functional.refconv2d(x, basis, w_r, None, (0, 1), (1, 1), (1, 1), 8)
    with pytest.raises(ValueError, match="padding_mode"):
        functional.refconv2d(x, basis, w_r, None, (2, 1), (1, 1), (1, 1), 8, padding_mode="mirror")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        (3,),
        (3, (), True, 1, "same", 1, 1, "zeros"),
        ("3", (), True),
        (-1, (), True),
        (99, (), True),
        (3, [], True),
        (3, (None,), True),
        (0, (1, 2), True),
    ],
    ids=str,
)
def test_the_module_survives_any_call(arguments: tuple[Any, ...]) -> None:
    assert native._native.call(*arguments) is None
    assert native._native.remember(True, *arguments) is None
    assert native._native.remember() is None


def test_threads_of_a_data_loader_or_a_server(counter: Counter) -> None:
    function, tensors = calls(torch.float32)["depthwise layer"]
    expected = torch.autograd.grad(function(*tensors).sum(), tensors)
    results: list[Any] = []

    def work() -> None:
        for _ in range(20):
            results.append(torch.autograd.grad(function(*tensors).sum(), tensors))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    for grads in results:
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_modules_train_alike_with_and_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = refocus(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 3, 9, 9)).square().mean().backward()
            optimizer.step()
        return model.state_dict()

    with_them = trained()
    monkeypatch.setattr(native, "_native", None)
    without = trained()
    assert all(torch.equal(value, without[name]) for name, value in with_them.items())


def test_they_are_for_one_release_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.1+cpu")
    module, reason = native._load()
    built = cpu.native.build_info()["torch_headers"]
    assert module is None
    assert reason == f"built with torch {built}, this is 2.99.1: reinstall refconv_kernels to have them"
    monkeypatch.setattr(cpu, "native", None)
    assert native._load() == (None, "the native library is not there")
