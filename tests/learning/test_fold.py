"""Folding a file gives what folding its network gives: values, names and their order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refconv_kernels import RefConv2d, refocus, reparameterize, variant
from refconv_kernels.learning.arms import ARMS
from refconv_kernels.learning.checkpoint import Checkpoint, read_weights, write, write_weights
from refconv_kernels.learning.errors import CheckFailed, CheckpointError
from refconv_kernels.learning.fold import check_fold, fold_file, fold_weights
from refconv_kernels.variants import VARIANTS


class Network(nn.Sequential):
    """Names that begin alike, biases, a kernel that is not square, and layers that are not folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.conv2 = nn.Conv2d(6, 6, (3, 5), groups=6, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.block = nn.Sequential(nn.Conv2d(6, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def plain() -> nn.Module:
    torch.manual_seed(5)
    return Network()


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype
        assert torch.equal(got[key], tensor), key
        assert not got[key].requires_grad


def theirs(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` by the names of the authors' module."""
    return {
        key.replace("basis_weight", "weight").replace("transform.weight", "convmap.weight"): t
        for key, t in state.items()
    }


#: Ways to refocus, and what has to be said about them.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({}, {}),
    "thin": ({"form": "thin"}, {}),
    "map of 1": ({"map_size": 1}, {}),
    "trainable": ({"basis": "trainable"}, {}),
    "no identity": ({"identity": False}, {"identity": False}),
    "thin, no identity": ({"form": "thin", "identity": False}, {"identity": False}),
}
for _name in VARIANTS:
    KINDS[_name] = ({"transform": lambda conv, name=_name: variant(name, conv)}, {"transform": _name})
KINDS["2B1L, no identity"] = (
    {"transform": lambda conv: variant("2B1L", conv, identity=False)},
    {"transform": "2B1L", "identity": False},
)
KINDS["1B2L+SE, map of 1"] = (
    {"transform": lambda conv: variant("1B2L+SE", conv, map_size=1)},
    {"transform": "1B2L+SE"},
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_reparameterize_gives(kind: str, dtype: torch.dtype) -> None:
    options, said = KINDS[kind]
    model = refocus(plain().to(dtype), **options)
    state = model.state_dict()
    before = {key: t.clone() for key, t in state.items()}
    folded, layers = fold_weights(state, **said)
    assert layers == 3
    same(folded, dict(reparameterize(model).state_dict()))
    same(dict(state), before)
    network = plain().to(dtype)
    network.load_state_dict(folded, strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_is_the_network(kind: str) -> None:
    options, said = KINDS[kind]
    for bias in (True, False):
        layer = refocus(nn.Conv2d(4, 4, 3, groups=4, bias=bias), **options)
        assert isinstance(layer, RefConv2d)
        folded, layers = fold_weights(layer.state_dict(), **said)
        assert layers == 1
        same(folded, dict(layer.fuse().state_dict()))


@pytest.mark.parametrize("identity", [True, False])
def test_the_authors_names(identity: bool) -> None:
    model = refocus(plain(), identity=identity)
    state = theirs(dict(model.state_dict()))
    assert {"conv.weight", "conv.bias", "conv.convmap.weight", "block.2.weight"} <= set(state)
    assert not any("basis" in key or "transform" in key for key in state)
    folded, layers = fold_weights(state, identity=identity)
    assert layers == 3
    same(folded, dict(reparameterize(model).state_dict()))
    layer = refocus(nn.Conv2d(4, 4, 3, groups=4), identity=identity)
    same(fold_weights(theirs(dict(layer.state_dict())), identity=identity)[0], dict(layer.fuse().state_dict()))


def test_what_is_not_refocused_is_passed_on() -> None:
    state = dict(plain().state_dict()) | {"a.transform.weight": torch.ones(1), "my_basis_weight": torch.ones(2)}
    state["reconvmap.weight"] = torch.ones(3)
    folded, layers = fold_weights(state)
    assert layers == 0
    same(folded, state)
    assert fold_weights({}) == ({}, 0)


def test_only_the_layers_that_were_refocused() -> None:
    model = refocus(plain(), where=lambda name, _: name == "conv2")
    folded, layers = fold_weights(model.state_dict())
    assert layers == 1
    same(folded, dict(reparameterize(model).state_dict()))


class Custom(nn.Module):
    """A transformation of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, basis: Tensor) -> Tensor:
        return basis * self.scale


class Silent(nn.Module):
    def forward(self, basis: Tensor) -> Tensor:
        return 2 * basis


@pytest.mark.parametrize("transform", [None, "1B2L"])
@pytest.mark.parametrize(("made", "has"), [(Custom, "scale"), (Silent, "no weights")])
def test_an_unknown_transformation_is_refused(made: Callable[[], nn.Module], has: str, transform: str | None) -> None:
    model = refocus(plain(), where=lambda name, _: name == "block.0", transform=lambda _: made())
    with pytest.raises(CheckpointError) as caught:
        fold_weights(model.state_dict(), transform=transform)
    assert str(caught.value) == (
        f"layer block.0 cannot be folded: its transformation has {has}, which is none of this library's by default; "
        "fold the network itself with refconv_kernels.reparameterize"
    )


def test_a_variant_that_is_not_named_is_refused() -> None:
    layer = refocus(nn.Conv2d(4, 4, 3), transform=lambda conv: variant("1B2L+SE", conv))
    message = (
        r"^layer \(the network\) cannot be folded: its transformation has weights.0, weights.1, attention.reduction"
    )
    with pytest.raises(CheckpointError, match=message):
        fold_weights(layer.state_dict())
    for wrong in ("2B1L", "3B1L", "1B2L"):
        with pytest.raises(CheckpointError, match=r"^layer \(the network\) cannot be folded: Error\(s\) in loading"):
            fold_weights(layer.state_dict(), transform=wrong)
    with pytest.raises(CheckpointError, match=r"cannot be folded: name \(='4B4L'\) must be one of"):
        fold_weights(layer.state_dict(), transform="4B4L")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: {**state, "conv.transform.weight": torch.ones(3, 2, 3, 3)},
        lambda state: {**state, "conv.transform.weight": torch.ones(12, 9)},  # thin, and its factor is missing
        lambda state: {**state, "conv.transform.weight": state["conv.transform.weight"].double()},
        lambda state: {**state, "conv.transform.more": torch.ones(1)},
        lambda state: {key: t for key, t in state.items() if key != "conv.transform.weight"},
    ],
)
def test_weights_that_do_not_fit(spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    with pytest.raises(CheckpointError, match=r"^layer conv cannot be folded: .+"):
        fold_weights(spoil(dict(refocus(plain()).state_dict())))


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["out.safetensors", "out.pth", "out.pt"])
@pytest.mark.parametrize("source", ["in.safetensors", "in.pth"])
def test_from_file_to_file(tmp_path: Path, source: str, output: str) -> None:
    model = refocus(plain(), form="thin")
    write_weights(tmp_path / source, model.state_dict())
    assert fold_file(tmp_path / source, tmp_path / output) == 3
    folded, about = read_weights(tmp_path / output)
    want = dict(reparameterize(model).state_dict())
    same({key: folded[key] for key in want}, want)  # safetensors sorts names
    assert (set(folded), about) == (set(want), {})


@pytest.mark.parametrize("name", ARMS)
def test_a_checkpoint_says_how(tmp_path: Path, name: str) -> None:
    """Of each arm, in the folder of its training, with an average that goes before the weights."""
    model = ARMS[name].start(plain())
    tensors = {f"model.{key}": t.clone() for key, t in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    tensors |= {f"average.{key}": p.detach() for key, p in model.named_parameters()}
    write(tmp_path / "checkpoint.safetensors", Checkpoint(tensors, {"arm": name}))
    assert fold_file(tmp_path, tmp_path / "out.pth") == (3 if ARMS[name].refocused else 0)
    want = dict(reparameterize(model).state_dict())
    folded = read_weights(tmp_path / "out.pth")[0]
    same({key: folded[key] for key in want}, want)


def test_identity_can_be_said_over_the_checkpoint(tmp_path: Path) -> None:
    model = refocus(plain(), identity=False)
    write_weights(tmp_path / "in.pth", model.state_dict())
    fold_file(tmp_path / "in.pth", tmp_path / "with.pth")
    fold_file(tmp_path / "in.pth", tmp_path / "without.pth", identity=False)
    with_it, without = (read_weights(tmp_path / f"{name}.pth")[0] for name in ("with", "without"))
    same(without, dict(reparameterize(model).state_dict()))
    basis = model.state_dict()["conv.basis_weight"]
    torch.testing.assert_close(with_it["conv.weight"], without["conv.weight"] + basis)

    tensors = {f"model.{key}": t for key, t in model.state_dict().items()}
    write(tmp_path / "checkpoint.safetensors", Checkpoint(tensors, {"arm": "no-identity"}))
    fold_file(tmp_path, tmp_path / "other.pth", identity=True)
    other = read_weights(tmp_path / "other.pth")[0]
    same({key: other[key] for key in with_it}, with_it)


def test_errors_of_files(tmp_path: Path) -> None:
    source = tmp_path / "in.pth"
    for name in ("out", "out.onnx", "out.th"):
        with pytest.raises(CheckpointError) as caught:
            fold_file(source, tmp_path / name)  # before anything is read
        assert str(caught.value) == f"output (='{tmp_path / name}') must end in .safetensors, .pth or .pt"
    with pytest.raises(CheckpointError, match=rf"^{source} does not exist$"):
        fold_file(source, tmp_path / "out.pth")
    write_weights(source, refocus(plain()).state_dict())
    for suffix in ("pth", "safetensors"):
        with pytest.raises(CheckpointError, match=rf"^cannot write {tmp_path}/missing/out.{suffix}: "):
            fold_file(source, tmp_path / "missing" / f"out.{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


# --- the check ----------------------------------------------------------------------------------------------


class Constant(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = torch.tensor(values)

    def forward(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return self.values.expand(len(images), -1)


def test_check_fold_of_a_fold() -> None:
    refocused = refocus(plain())
    folded = reparameterize(refocused)
    refocused.train()
    folded.train()
    images = torch.rand(9, 2, 12, 12)
    difference = check_fold(refocused, folded, images)
    assert not refocused.training
    assert not folded.training
    with torch.no_grad():
        assert difference == (refocused(images) - folded(images)).abs().max().item()
    assert difference < 1e-5


@pytest.mark.parametrize("layer", ["conv", "conv2", "block.0"])
def test_check_fold_finds_a_wrong_layer(layer: str) -> None:
    refocused = refocus(plain())
    folded = reparameterize(refocused)
    folded.get_parameter(f"{layer}.weight").data[0] += 0.5
    with pytest.raises(CheckFailed, match=r"^folding changed the logits by \S+; rounding explains at most 0.0001$"):
        check_fold(refocused, folded, torch.rand(9, 2, 12, 12))


def test_check_fold_has_its_limits() -> None:
    images = torch.zeros(7, 1)
    assert check_fold(Constant(1, 2), Constant(1, 2.0001), images) == pytest.approx(1e-4, rel=0.01)
    for values in ((1, 2.0003), (1, float("nan")), (1, float("inf"))):
        with pytest.raises(CheckFailed, match=r"^folding changed the logits by .*; rounding explains at most 0.0002$"):
            check_fold(Constant(1, 2), Constant(*values), images)
    assert check_fold(Constant(1, 2000), Constant(1, 2000.1), images) == pytest.approx(0.1, rel=0.01)


def test_check_fold_lets_ties_change() -> None:
    images = torch.zeros(7, 1)
    tie = Constant(2, 2.00001), Constant(2.00001, 2)
    assert check_fold(*tie, images) == pytest.approx(1e-5, rel=0.1)
    assert check_fold(Constant(3.0), Constant(3.0), images) == 0  # one class
