"""Networks to train: small depthwise-separable ones, MobileNetV1 and V2, ResNet-20, and where others come from."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from refconv_kernels.learning.errors import SettingsError, require

__all__ = ["BUILT_IN", "MobileNetV1", "MobileNetV2", "ResNet20", "SmallSeparableNet", "build"]


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True) -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)


def _separable(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(_conv_bn(inputs, inputs, 3, stride, groups=inputs), _conv_bn(inputs, outputs, 1))


class SmallSeparableNet(nn.Module):
    """A stem and a few depthwise-separable blocks, for small images ``[B, channels, H, W]``.

    Returns logits ``[B, classes]``.
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 10,
        widths: tuple[int, ...] = (32, 64, 96, 128),
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.stem = _conv_bn(channels, widths[0], 3, stem_stride)
        # The resolution halves at every second block.
        pairs = itertools.pairwise(widths)
        self.blocks = nn.Sequential(*(_separable(i, o, 1 + n % 2) for n, (i, o) in enumerate(pairs)))
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(images)).mean((2, 3)))


class MobileNetV1(nn.Module):
    """MobileNetV1 at width 1 (Howard et al., 2017). Images ``[B, channels, H, W]``, logits ``[B, classes]``."""

    def __init__(self, classes: int = 1000, channels: int = 3) -> None:
        super().__init__()
        outputs = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
        layers, width = [_conv_bn(channels, 32, 3, 2)], 32
        for out, stride in outputs:
            layers.append(_separable(width, out, stride))
            width = out
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers = [] if expansion == 1 else [_conv_bn(inputs, hidden, 1)]
        layers += [_conv_bn(hidden, hidden, 3, stride, groups=hidden), _conv_bn(hidden, outputs, 1, relu=False)]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 at width 1 (Sandler et al., 2018), with ReLU.

    Images ``[B, channels, H, W]``, logits ``[B, classes]``.
    """

    def __init__(self, classes: int = 1000, channels: int = 3) -> None:
        super().__init__()
        # expansion, output channels, blocks, stride of the first block
        plan = [
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ]
        layers, width = [_conv_bn(channels, 32, 3, 2)], 32
        for expansion, out, blocks, stride in plan:
            for block in range(blocks):
                layers.append(_InvertedResidual(width, out, stride if block == 0 else 1, expansion))
                width = out
        layers.append(_conv_bn(width, 1280, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.added:  # option A of the paper: every other pixel, the new channels zero
            half = self.added // 2
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], [0, 0, 0, 0, half, self.added - half])
        return (x + y).relu()


class ResNet20(nn.Module):
    """ResNet-20 for 32x32 images (He et al., 2015, section 4.2), shortcuts without parameters.

    Images ``[B, channels, H, W]``, logits ``[B, classes]``. Names as in widely used checkpoints
    (``layer1.0.conv1``, ``linear``), which load as they are.
    """

    def __init__(self, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(_BasicBlock(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(*(_BasicBlock(16 if n == 0 else 32, 32, 2 - (n > 0)) for n in range(3)))
        self.layer3 = nn.Sequential(*(_BasicBlock(32 if n == 0 else 64, 64, 2 - (n > 0)) for n in range(3)))
        self.linear = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.bn1(self.conv1(images)).relu()
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


#: Networks by name: what ``--model`` takes without a colon.
BUILT_IN: dict[str, Callable[[int, int], nn.Module]] = {
    "small": lambda channels, classes: SmallSeparableNet(channels, classes),
    "separable": lambda channels, classes: SmallSeparableNet(channels, classes, (16, 32, 64, 64, 128, 128), 2),
    "mobilenetv1": lambda channels, classes: MobileNetV1(classes, channels),
    "mobilenetv2": lambda channels, classes: MobileNetV2(classes, channels),
    "resnet20": lambda channels, classes: ResNet20(classes, channels),
}


def build(name: str, channels: int, classes: int) -> nn.Module:
    """A classifier with random weights, images ``[B, channels, H, W]`` to logits ``[B, classes]``.

    Args:
        name: one of :data:`BUILT_IN`; ``timm:<name>``; ``torchvision:<name>``; or ``<module>:<function>``, a function
            that is called with ``num_classes=classes`` and returns a module. That imports the module: it is code.
        channels: of the images.
        classes: number of classes.

    Raises:
        SettingsError: there is no such network, it cannot be built, or it cannot take ``channels``.
        MissingExtra: timm or torchvision is not installed.

    Example:
        >>> build("resnet20", 3, 10)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    if name in BUILT_IN:
        return BUILT_IN[name](channels, classes)
    source, colon, inner = name.partition(":")
    if not colon or not source or not inner:
        known = ", ".join(BUILT_IN)
        raise SettingsError(
            f"model (={name!r}) must be one of {known}, or timm:NAME, torchvision:NAME or MODULE:FUNCTION"
        )
    arguments: dict[str, Any] = {"num_classes": classes}
    if source == "timm":
        function: Any = require("timm", extra=None).create_model
        arguments.update(model_name=inner, in_chans=channels)
    elif source == "torchvision":
        if channels != 3:
            raise SettingsError(f"model (={name!r}) takes images of 3 channels, these have {channels}")
        function = require("torchvision.models", extra=None).get_model
        arguments.update(name=inner)
    else:
        try:
            function = getattr(importlib.import_module(source), inner)
        except Exception as error:
            raise SettingsError(f"model (={name!r}) cannot be imported: {type(error).__name__}: {error}") from error
    try:
        model = function(**arguments)
    except Exception as error:
        raise SettingsError(f"model (={name!r}) cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise SettingsError(f"model (={name!r}) is a {type(model).__name__}, it must be a torch.nn.Module")
    return model
