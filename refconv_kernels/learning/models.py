"""Networks to train: a small depthwise-separable one, MobileNetV1 and MobileNetV2, in plain PyTorch."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

__all__ = ["MobileNetV1", "MobileNetV2", "SmallSeparableNet"]


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

    def __init__(self, channels: int = 1, classes: int = 10, widths: tuple[int, ...] = (32, 64, 96, 128)) -> None:
        super().__init__()
        self.stem = _conv_bn(channels, widths[0], 3)
        # The resolution halves at every second block.
        pairs = itertools.pairwise(widths)
        self.blocks = nn.Sequential(*(_separable(i, o, 1 + n % 2) for n, (i, o) in enumerate(pairs)))
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(images)).mean((2, 3)))


class MobileNetV1(nn.Module):
    """MobileNetV1 at width 1 (Howard et al., 2017). Images ``[B, 3, H, W]``, logits ``[B, classes]``."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        outputs = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
        layers, width = [_conv_bn(3, 32, 3, 2)], 32
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
    """MobileNetV2 at width 1 (Sandler et al., 2018), with ReLU. Images ``[B, 3, H, W]``, logits ``[B, classes]``."""

    def __init__(self, classes: int = 1000) -> None:
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
        layers, width = [_conv_bn(3, 32, 3, 2)], 32
        for expansion, out, blocks, stride in plan:
            for block in range(blocks):
                layers.append(_InvertedResidual(width, out, stride if block == 0 else 1, expansion))
                width = out
        layers.append(_conv_bn(width, 1280, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))
