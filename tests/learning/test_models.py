"""The networks that can be named: their shapes, their published sizes, and what is said of a wrong name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from refconv_kernels.learning.errors import MissingExtra, SettingsError
from refconv_kernels.learning.models import BUILT_IN, MobileNetV1, MobileNetV2, ResNet20, build

MODULE = """
from torch import nn

def network(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))

def failing(num_classes):
    raise KeyError("no weights")

def number(num_classes):
    return num_classes

def other(classes):
    return nn.Identity()

value = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's, ``user_networks``, that can be imported."""
    path = tmp_path / "user_networks.py"
    path.write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "user_networks", raising=False)
    return path


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_networks_give_logits(name: str, channels: int) -> None:
    model = build(name, channels, 7).eval()
    with torch.no_grad():
        for size in (32, 40):
            assert model(torch.rand(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "channels", "classes", "published"),
    [
        ("resnet20", 3, 10, 269_722),  # He et al., table 6: 0.27 M
        ("mobilenetv1", 3, 1000, 4_231_976),  # Howard et al., table 8: 4.2 M
        ("mobilenetv2", 3, 1000, 3_504_872),  # Sandler et al., table 4: 3.4 M; torchvision's own count
    ],
)
def test_published_numbers_of_parameters(name: str, channels: int, classes: int, published: int) -> None:
    with torch.device("meta"):
        assert parameters(build(name, channels, classes)) == published
        fewer = build(name, 1, classes)
        wider = build(name, channels, classes + 1)
    stem = next(m for m in fewer.modules() if isinstance(m, nn.Conv2d))
    last = [m for m in wider.modules() if isinstance(m, nn.Linear)][-1]
    assert parameters(fewer) == published - (channels - 1) * stem.weight[:, 0].numel()
    assert parameters(wider) == published + last.in_features + 1


def test_classes_and_channels_of_the_constructors() -> None:
    with torch.device("meta"):
        for kind, classes in ((MobileNetV1, 1000), (MobileNetV2, 1000), (ResNet20, 10)):
            assert kind()(torch.empty(2, 3, 32, 32)).shape == (2, classes)


def test_resnet20_has_the_names_of_common_checkpoints() -> None:
    names = set(build("resnet20", 3, 10).state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer3.2.bn2.bias", "linear.bias"} <= names
    assert not any("shortcut" in name or "downsample" in name for name in names)


def test_resnet20_shortcut_is_option_a() -> None:
    block = build("resnet20", 3, 10).layer2[0].eval()  # type: ignore[index, union-attr]
    nn.init.zeros_(block.bn2.weight)  # nothing but the shortcut
    x = torch.rand(1, 16, 8, 8)
    with torch.no_grad():
        y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_a_function_of_the_users(user_module: Path) -> None:
    model = build("user_networks:network", 3, 5)
    assert model(torch.rand(2, 3, 2, 2)).shape == (2, 5)


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user_networks:failing", r"cannot be built: KeyError: 'no weights'$"),
        ("user_networks:other", r"cannot be built: TypeError: other\(\) got an unexpected keyword .*'num_classes'"),
        ("user_networks:value", r"cannot be built: TypeError: 'int' object is not callable$"),
        ("user_networks:number", r"is a int, it must be a torch.nn.Module$"),
        ("user_networks:nothing", r"cannot be imported: AttributeError: .*has no attribute 'nothing'$"),
        ("no_such_module:network", r"cannot be imported: ModuleNotFoundError: No module named 'no_such_module'$"),
        (".relative:network", r"cannot be imported: TypeError: "),
    ],
)
def test_functions_that_do_not_give_a_network(name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=rf"^model \(='{name}'\) {message}"):
        build(name, 3, 5)


@pytest.mark.parametrize("text", ["def network(:", "raise ValueError('broken')"])
def test_a_module_that_does_not_import(user_module: Path, text: str) -> None:
    user_module.write_text(text)
    with pytest.raises(SettingsError, match=r"^model \(='user_networks:f'\) cannot be imported: (Syntax|Value)Error: "):
        build("user_networks:f", 3, 5)


@pytest.mark.parametrize("name", ["", "resnet", "ResNet20", "timm", "timm:", ":network", ":"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(SettingsError) as caught:
        build(name, 3, 5)
    known = "small, separable, mobilenetv1, mobilenetv2, resnet20, or timm:NAME, torchvision:NAME or MODULE:FUNCTION"
    assert str(caught.value) == f"model (={name!r}) must be one of {known}"


# --- other libraries ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("channels", [1, 3])
def test_timm(channels: int) -> None:
    with torch.device("meta"):
        model = build("timm:mobilenetv3_small_050", channels, 4)
        assert model(torch.empty(2, channels, 64, 64)).shape == (2, 4)
    with pytest.raises(SettingsError, match=r"^model \(='timm:no_such'\) cannot be built: RuntimeError: Unknown model"):
        build("timm:no_such", channels, 4)


@pytest.mark.usefixtures("libraries")
def test_torchvision() -> None:
    with torch.device("meta"):
        model = build("torchvision:shufflenet_v2_x0_5", 3, 4)
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 4)
    with pytest.raises(SettingsError, match=r"^model \(='torchvision:no_such'\) cannot be built: ValueError: Unknown"):
        build("torchvision:no_such", 3, 4)


def test_torchvisions_networks_take_colours() -> None:
    message = r"^model \(='torchvision:resnet18'\) takes images of 3 channels, these have 1$"
    with pytest.raises(SettingsError, match=message):
        build("torchvision:resnet18", 1, 4)


@pytest.mark.parametrize(("package", "module"), [("timm", "timm"), ("torchvision", "torchvision.models")])
def test_without_the_library(package: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"^{package} cannot be imported \(.*\): pip install {package}$"):
        build(f"{package}:resnet18", 3, 5)
