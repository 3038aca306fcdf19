"""Networks for whole training steps, in plain PyTorch. Images ``[B, 3, H, W]``, logits ``[B, classes]``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refconv_kernels import FusedSGD, RefConv2d
from refconv_kernels.learning.models import MobileNetV1, MobileNetV2


def _conv_bn(
    inputs: int,
    outputs: int,
    kernel_size: int,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None = None,
) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    layers = [conv, nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, activation(inplace=True)) if activation else nn.Sequential(*layers)


class _SqueezeExcitation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = max(8, (channels // 4 + 4) // 8 * 8)  # a quarter, to the nearest multiple of 8 ...
        squeezed += 8 if squeezed < 0.9 * (channels // 4) else 0  # ... that loses at most a tenth
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(squeezed, channels, 1),
            nn.Hardsigmoid(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class _Bottleneck(nn.Module):
    """Expansion, depthwise convolution, squeeze-and-excitation, projection."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, kernel_size: int, stride: int, squeeze: bool, hard_swish: bool
    ) -> None:
        super().__init__()
        activation = nn.Hardswish if hard_swish else nn.ReLU
        self.layers = nn.Sequential(
            nn.Identity() if hidden == inputs else _conv_bn(inputs, hidden, 1, activation=activation),
            _conv_bn(hidden, hidden, kernel_size, stride, hidden, activation),
            _SqueezeExcitation(hidden) if squeeze else nn.Identity(),
            _conv_bn(hidden, outputs, 1),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileNetV3Large(nn.Module):
    """MobileNetV3-Large at width 1 (Howard et al., 2019), Table 1 of its paper."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        plan = [  # kernel size, expanded channels, output channels, squeeze-and-excitation, hard swish, stride
            (3, 16, 16, False, False, 1),
            (3, 64, 24, False, False, 2),
            (3, 72, 24, False, False, 1),
            (5, 72, 40, True, False, 2),
            (5, 120, 40, True, False, 1),
            (5, 120, 40, True, False, 1),
            (3, 240, 80, False, True, 2),
            (3, 200, 80, False, True, 1),
            (3, 184, 80, False, True, 1),
            (3, 184, 80, False, True, 1),
            (3, 480, 112, True, True, 1),
            (3, 672, 112, True, True, 1),
            (5, 672, 160, True, True, 2),
            (5, 960, 160, True, True, 1),
            (5, 960, 160, True, True, 1),
        ]
        layers: list[nn.Module] = [_conv_bn(3, 16, 3, 2, activation=nn.Hardswish)]
        width = 16
        for kernel_size, hidden, outputs, squeeze, hard_swish, stride in plan:
            layers.append(_Bottleneck(width, hidden, outputs, kernel_size, stride, squeeze, hard_swish))
            width = outputs
        layers.append(_conv_bn(width, 960, 1, activation=nn.Hardswish))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(960, 1280), nn.Hardswish(inplace=True), nn.Linear(1280, classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _conv_bn(inputs, outputs, 3, stride, activation=nn.ReLU), _conv_bn(outputs, outputs, 3)
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv_bn(inputs, outputs, 1, stride)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.layers(x) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 (He et al., 2016)."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_bn(3, 64, 7, 2, activation=nn.ReLU), nn.MaxPool2d(3, 2, 1)]
        width = 64
        for outputs, stride in [(64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)]:
            layers.append(_BasicBlock(width, outputs, stride))
            width = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


class _ChannelNorm(nn.LayerNorm):
    """Over the channels of ``[B, C, H, W]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.pointwise = nn.Sequential(
            nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.scale * self.pointwise(self.depthwise(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class ConvNeXtTiny(nn.Module):
    """ConvNeXt-T (Liu et al., 2022), without stochastic depth."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        widths = (96, 192, 384, 768)
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), _ChannelNorm(widths[0], eps=1e-6)]
        for stage, (width, depth) in enumerate(zip(widths, (3, 3, 9, 3), strict=True)):
            if stage:
                layers += [_ChannelNorm(widths[stage - 1], eps=1e-6), nn.Conv2d(widths[stage - 1], width, 2, 2)]
            layers += [_ConvNeXtBlock(width) for _ in range(depth)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.LayerNorm(widths[-1], eps=1e-6), nn.Linear(widths[-1], classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


#: Whole training steps: the network, its batch, and the side of its square images in pixels.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "MobileNetV1_b32_64px": (MobileNetV1, 32, 64),
    "MobileNetV2_b32_64px": (MobileNetV2, 32, 64),
    "MobileNetV2_b8_224px": (MobileNetV2, 8, 224),
    "MobileNetV3-L_b32_64px": (MobileNetV3Large, 32, 64),
    "ResNet-18_b8_112px": (ResNet18, 8, 112),
}


def training_step(
    model: nn.Module, images: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], object]:
    """A function that runs forward, cross entropy, backward, and SGD with momentum: ours or PyTorch's (:func:`sgd`)."""
    chosen = optimizer or sgd(model)

    def step() -> None:
        chosen.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        chosen.step()

    return step


def sgd(model: nn.Module, stock: bool = False) -> torch.optim.SGD:
    """Fused SGD with momentum: this library's for its own layers, PyTorch's for all others, or ``stock``."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if stock or not any(isinstance(module, RefConv2d) for module in model.modules()):
        return torch.optim.SGD(trained, lr=1e-3, momentum=0.9, fused=True)
    return FusedSGD(trained, model, lr=1e-3, momentum=0.9)
