"""What each arm starts from: its layers, what is trained, and what it shares with the pretrained network."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from refconv_kernels import RefConv2d, summary
from refconv_kernels.learning.arms import ARMS, Arm
from refconv_kernels.learning.errors import SettingsError
from refconv_kernels.learning.recipe import Recipe
from refconv_kernels.transforms import RefocusingTransformation, ThinRefocusingTransformation
from refconv_kernels.variants import ParallelRefocusing, StackedRefocusing

REFOCUSED = [name for name, arm in ARMS.items() if arm.refocused]
PLAIN = ["baseline", "retrain", "finetune", "retrain-tuned"]
VARIANTS = {"2b1l": "2B1L", "3b1l": "3B1L", "1b2l": "1B2L", "1b2l-gelu": "1B2L+GELU", "1b1l-se": "1B1L+SE"}
VARIANTS["1b2l-se"] = "1B2L+SE"
LINEAR = ["refconv", "refconv-tuned", "zero", "no-identity", "random-basis"]
RANDOM = ["random-basis", "random-trainable-basis"]
#: Where the layers are that every refocused arm replaces; "pointwise" and "small" are left alone.
LAYERS = ("stem", "depthwise")


class Network(nn.Sequential):
    """A dense and a depthwise convolution, with bias, one 1x1 and one smaller than the map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, (3, 5), padding=1, groups=6)
        self.pointwise = nn.Conv2d(6, 8, 1)
        self.small = nn.Conv2d(8, 8, 2, groups=8)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@pytest.fixture
def pretrained() -> nn.Module:
    torch.manual_seed(11)
    return Network()


def started(name: str, pretrained: nn.Module, **options: object) -> nn.Module:
    torch.manual_seed(3)
    return ARMS[name].start(pretrained, **options)  # type: ignore[arg-type]


def layers(model: nn.Module) -> dict[str, RefConv2d]:
    return {name: m for name, m in model.named_modules() if isinstance(m, RefConv2d)}


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def test_there_are_the_arms_of_the_paper() -> None:
    assert list(ARMS) == [*PLAIN, *LINEAR, "trainable-basis", "random-trainable-basis", *VARIANTS]
    assert [name for name, arm in ARMS.items() if not arm.refocused] == PLAIN
    assert {name: arm.transform for name, arm in ARMS.items() if arm.transform is not None} == VARIANTS
    assert [name for name, arm in ARMS.items() if arm.can_be_thin] == LINEAR
    assert [name for name, arm in ARMS.items() if arm.random_basis] == RANDOM
    assert len({arm.text for arm in ARMS.values()}) == len(ARMS)


@pytest.mark.parametrize("name", ARMS)
def test_a_start_computes_and_leaves_the_pretrained_network(name: str, pretrained: nn.Module) -> None:
    before, modules = copied(pretrained.state_dict()), list(pretrained.modules())
    model = started(name, pretrained)
    x = torch.rand(3, 2, 8, 8)
    assert model(x).shape == (3, 4)
    model(x).square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)  # nothing is shared
    assert list(pretrained.modules()) == modules
    assert all(torch.equal(t, before[key]) for key, t in pretrained.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in pretrained.parameters())


@pytest.mark.parametrize("name", ARMS)
def test_same_seed_same_start(name: str, pretrained: nn.Module) -> None:
    first, again = started(name, pretrained).state_dict(), started(name, pretrained).state_dict()
    assert list(first) == list(again)
    assert all(torch.equal(t, again[key]) for key, t in first.items())
    torch.manual_seed(4)
    other = ARMS[name].start(pretrained).state_dict()
    drawn = ARMS[name].refocused and name != "zero"
    assert any(not torch.equal(t, other[key]) for key, t in first.items()) == drawn


@pytest.mark.parametrize("name", PLAIN)
def test_plain_arms_start_from_the_pretrained_network(name: str, pretrained: nn.Module) -> None:
    for form in ("full", "thin"):  # it does not matter here
        model = started(name, pretrained, form=form)
        assert not layers(model)
        assert all(torch.equal(t, model.state_dict()[key]) for key, t in pretrained.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", REFOCUSED)
def test_the_same_layers_are_refocused_in_every_arm(name: str, pretrained: nn.Module) -> None:
    assert tuple(layers(started(name, pretrained))) == LAYERS


@pytest.mark.parametrize("name", REFOCUSED)
def test_what_is_trained(name: str, pretrained: nn.Module) -> None:
    model = started(name, pretrained)
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    trainable = name in ("trainable-basis", "random-trainable-basis")
    assert frozen == (set() if trainable else {f"{layer}.basis_weight" for layer in LAYERS})
    own = [p for layer in layers(model).values() for p in layer.transform.parameters()]
    assert own
    assert all(p.requires_grad for p in own)


@pytest.mark.parametrize("name", REFOCUSED)
def test_what_stays_of_the_pretrained_network(name: str, pretrained: nn.Module) -> None:
    model, before = started(name, pretrained), pretrained.state_dict()
    after = model.state_dict()
    for layer in LAYERS:
        same = torch.equal(after[f"{layer}.basis_weight"], before[f"{layer}.weight"])
        assert same == (name not in RANDOM)
    for key, tensor in before.items():
        if key not in [f"{layer}.weight" for layer in LAYERS]:
            assert torch.equal(after[key], tensor), key  # biases too


@pytest.mark.parametrize("name", RANDOM)
def test_a_random_basis_is_drawn_as_torch_does(name: str) -> None:
    model = started(name, nn.Sequential(nn.Conv2d(64, 64, 3)))
    basis, bound = model[0].basis_weight.detach(), 1 / math.sqrt(64 * 9)  # type: ignore[index, union-attr]
    assert 0.99 * bound < basis.abs().max() <= bound
    assert basis.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("name", REFOCUSED)
def test_the_identity(name: str, pretrained: nn.Module) -> None:
    without = name == "no-identity"
    for layer in layers(started(name, pretrained)).values():
        assert layer.transform.identity is not without
        for parameter in layer.transform.parameters():
            nn.init.zeros_(parameter)
        assert torch.equal(layer.weight, torch.zeros_like(layer.weight) if without else layer.basis_weight)


def test_zero_starts_as_the_pretrained_network(pretrained: nn.Module) -> None:
    model = started("zero", pretrained, init="kaiming").eval()  # the arm says, not the setting
    for name, layer in layers(model).items():
        assert torch.equal(layer.weight, pretrained.get_parameter(f"{name}.weight"))
    x = torch.rand(2, 2, 8, 8)
    torch.testing.assert_close(model(x), pretrained.eval()(x))
    others = (layers(started(name, pretrained)) for name in REFOCUSED if name != "zero")
    assert not any(torch.equal(layer.weight, layer.basis_weight) for found in others for layer in found.values())


@pytest.mark.parametrize(("name", "variant"), [(None, None), *VARIANTS.items()])
def test_the_transformations_of_table_vii(name: str | None, variant: str | None, pretrained: nn.Module) -> None:
    for layer in layers(started(name or "refconv", pretrained)).values():
        transform = layer.transform
        if variant is None:
            assert type(transform) is RefocusingTransformation
        elif variant.endswith("B1L") and variant != "1B1L":
            assert type(transform) is ParallelRefocusing
            assert len(transform.weights) == int(variant[0])
        else:
            assert type(transform) is StackedRefocusing
            assert len(transform.weights) == int(variant[2])
            after = {"1B2L": None, "1B2L+GELU": "gelu", "1B1L+SE": "se", "1B2L+SE": "se"}
            assert transform.after_first == after[variant]


@pytest.mark.parametrize("name", REFOCUSED)
def test_init_and_map_size_reach_every_layer(name: str, pretrained: nn.Module) -> None:
    model = started(name, pretrained, init="xavier_normal", map_size=1)
    assert tuple(layers(model)) == (*LAYERS, "small")  # a map of 1x1 fits everywhere but into 1x1 kernels
    for layer in layers(model).values():
        assert layer.transform.map_size == 1
        assert layer.transform.init == ("zeros" if name == "zero" else "xavier_normal")


@pytest.mark.parametrize("name", REFOCUSED)
def test_nothing_to_refocus(name: str) -> None:
    for model in (nn.Sequential(nn.Conv2d(2, 2, 1)), nn.Sequential(nn.Linear(2, 2)), nn.Conv2d(2, 2, 2)):
        with pytest.raises(SettingsError, match=r"^model \((Sequential|Conv2d)\) has no convolution to refocus"):
            ARMS[name].start(model)


@pytest.mark.parametrize("name", REFOCUSED)
def test_a_single_convolution(name: str) -> None:
    conv = nn.Conv2d(4, 4, 3, groups=4)
    layer = started(name, conv)
    assert isinstance(layer, RefConv2d)
    assert torch.equal(layer.basis_weight, conv.weight) == (name not in RANDOM)
    assert torch.equal(layer.bias, conv.bias)


def test_a_map_that_fits_no_kernel(pretrained: nn.Module) -> None:
    with pytest.raises(SettingsError, match=r"has no convolution to refocus .*is smaller than map_size 7"):
        ARMS["refconv"].start(pretrained, map_size=7)


def test_attention_has_a_limit() -> None:
    with torch.device("meta"):
        wide = nn.Sequential(nn.Conv2d(512, 512, 3))
    with pytest.raises(SettingsError, match=r"^kernels \(=262144\) would need an attention of"):
        ARMS["1b1l-se"].start(wide)


# --- forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINEAR)
def test_thin_is_the_same_start(name: str, pretrained: nn.Module) -> None:
    full, thin = started(name, pretrained), started(name, pretrained, form="thin")
    assert {row.form for row in summary(full).layers} == {"full"}
    assert isinstance(thin.get_submodule("depthwise.transform"), ThinRefocusingTransformation)
    assert sum(p.numel() for p in thin.parameters()) < sum(p.numel() for p in full.parameters())
    for name_of_layer, layer in layers(thin).items():
        torch.testing.assert_close(layer.weight, layers(full)[name_of_layer].weight)
    x = torch.rand(2, 2, 8, 8)
    torch.testing.assert_close(thin(x), full(x))


@pytest.mark.parametrize("name", [name for name in REFOCUSED if name not in LINEAR])
def test_thin_is_refused_where_it_would_be_another_model(name: str, pretrained: nn.Module) -> None:
    with pytest.raises(SettingsError) as caught:
        ARMS[name].start(pretrained, form="thin")
    assert str(caught.value) == f"form (='thin') is another model in this arm ({ARMS[name].text}): use 'full'"


def test_an_unknown_form(pretrained: nn.Module) -> None:
    with pytest.raises(SettingsError, match=r"^form \(='wide'\) must be"):
        ARMS["refconv"].start(pretrained, form="wide")


# --- recipes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARMS)
def test_recipes(name: str) -> None:
    recipe = Recipe(epochs=7, lr=0.3, ema=0.5)
    expected = {"finetune": 1e-4, "retrain-tuned": 0.02, "refconv-tuned": 0.02}.get(name, 0.3)
    got = ARMS[name].recipe(recipe, 0.02)
    assert got == Recipe(epochs=7, lr=expected, ema=0.5)
    assert recipe.lr == 0.3


def test_tuned_needs_its_rate() -> None:
    message = (
        r"^this arm \(the baseline trained as long again, .*\) needs its learning rate chosen first: use learn compare$"
    )
    with pytest.raises(SettingsError, match=message):
        ARMS["retrain-tuned"].recipe(Recipe())


def test_a_new_arm() -> None:
    arm = Arm("its own", options={"basis": "trainable", "map_size": 1}, lr=0.5)
    model = arm.start(nn.Sequential(nn.Conv2d(2, 2, 3)))
    assert model[0].transform.map_size == 1  # type: ignore[index, union-attr]
    assert not arm.can_be_thin
    assert arm.recipe(Recipe()).lr == 0.5
    assert Arm("plain", refocused=False).can_be_thin is False
