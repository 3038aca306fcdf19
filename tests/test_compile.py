"""``torch.compile`` and ``torch.export``."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from refconv_kernels import FusedSGD, RefConv2d, refocus, reparameterize, use_backend
from tests.cases import DEPTHWISE, OTHERS, Case
from tests.conftest import BACKENDS, needs_native

pytestmark = [
    # Raised inside PyTorch's compiler, about PyTorch's own code.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
]
COMPILED = [DEPTHWISE[0], DEPTHWISE[3], DEPTHWISE[7], OTHERS[0], OTHERS[3]]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
@pytest.mark.parametrize(  # in what is one operator the forms differ: two cases show the thin one
    ("case", "form"), [*((case, "full") for case in COMPILED), *((case, "thin") for case in COMPILED[:2])], ids=str
)
def test_compile_fullgraph(case: Case, form: str, mode: str, backend: str) -> None:
    if mode == "inductor" and case is not COMPILED[0]:
        mode = "aot_eager"  # one real code generation is enough: the operators are opaque to it
    layer, x = RefConv2d(*case.args, **case.options, form=form), case.input(torch.float32).requires_grad_()
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, backend=mode, fullgraph=True)
    with use_backend(backend):
        want = layer(x)
        got = compiled(x)
        torch.testing.assert_close(got, want)
        leaves = [layer.transform.weight, layer.bias]
        want_grads = torch.autograd.grad(want.square().sum(), [x, *leaves])
        got_grads = torch.autograd.grad(got.square().sum(), [x, other.transform.weight, other.bias])
    torch.testing.assert_close(got_grads, want_grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("native", ["cpu" in BACKENDS])
def test_compiled_graph_holds_the_kernels_of_the_backend(native: bool) -> None:
    graphs = []

    def spy(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph.print_readable(print_output=False))
        return graph

    layer = RefConv2d(4, 4, 3, groups=4)
    with torch.no_grad():
        torch.compile(layer, backend=spy, fullgraph=True)(torch.randn(1, 4, 12, 12))
    assert ("refconv_cpu" in graphs[0] or "autograd_function" in graphs[0].lower()) == native
    with use_backend("reference"), torch.no_grad():
        torch.compile(layer, backend=spy, fullgraph=True)(torch.randn(1, 4, 12, 12))
    assert "refconv_cpu" not in graphs[-1]


def test_compiled_graph_holds_pytorchs_convolutions() -> None:
    """The compiler has plans of its own for them: they are no part of an opaque operator."""
    names: list[str] = []

    def spy(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        names.extend(node.target.__name__ for node in graph.graph.nodes if node.op == "call_function")
        return graph

    with torch.no_grad():
        torch.compile(RefConv2d(4, 4, 3), backend=spy, fullgraph=True)(torch.randn(1, 4, 12, 12))
    assert "conv2d" in names
    assert not any("refconv2d" in name for name in names)


def test_compile_with_dynamic_batch_and_eval(backend: str) -> None:
    layer = RefConv2d(4, 4, 3, groups=4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    with use_backend(backend):
        for batch in (2, 3, 5):
            x = torch.randn(batch, 4, 6, 7)
            torch.testing.assert_close(compiled(x), layer(x))
        layer.eval()
        with torch.no_grad():
            x = torch.randn(2, 4, 6, 7)
            torch.testing.assert_close(compiled(x), layer(x))
            layer.transform.weight.mul_(2)
            torch.testing.assert_close(compiled(x), layer(x))


def test_compile_under_autocast() -> None:
    layer, x = RefConv2d(4, 4, 3, groups=4), torch.randn(2, 4, 6, 6)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(x), layer(x))


def test_compiled_training_step_of_a_network() -> None:
    torch.manual_seed(0)
    model = refocus(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, padding=1)))
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 9, 9)
    for module, call in ((model, model), (other, compiled)):
        optimizer = torch.optim.SGD((p for p in module.parameters() if p.requires_grad), lr=0.01, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            call(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    """Exported programs hold PyTorch's own operators only: they run without this package."""
    plain = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 6, 3))
    model = refocus(plain, form="thin" if strict else "full").eval()
    x = torch.randn(2, 4, 9, 9)
    batch = torch.export.Dim("batch", min=1, max=64)
    for module in (model, reparameterize(model)):
        program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},), strict=strict)
        assert "refconv" not in str(program.graph)
        for size in (2, 5):
            y = torch.randn(size, 4, 9, 9)
            torch.testing.assert_close(program.module()(y), model(y))


@needs_native
def test_the_steps_of_fused_sgd_compile_nothing_anew() -> None:
    model = refocus(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 16, 3)).double())
    plain, counter = copy.deepcopy(model), CompileCounter()
    compiled = torch.compile(model, backend=counter)
    optimizer = FusedSGD(model.parameters(), model, lr=0.1, momentum=0.9)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for forward, each in ((compiled, optimizer), (plain, sgd)):
            each.zero_grad()
            forward(x).square().mean().backward()
            each.step()
    assert counter.frame_count == 1
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
