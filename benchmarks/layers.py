"""The convolutions with a kernel larger than 1x1 of the networks that RefConv is for, at 224 px."""

from __future__ import annotations

from dataclasses import dataclass, replace

#: Per network: in_channels, out_channels, kernel_size, stride, padding, groups, height and width, count.
_TABLE: dict[str, list[tuple[int, int, int, int, int, int, int, int]]] = {
    "MobileNetV1": [
        (3, 32, 3, 2, 1, 1, 224, 1),
        (32, 32, 3, 1, 1, 32, 112, 1),
        (64, 64, 3, 2, 1, 64, 112, 1),
        (128, 128, 3, 1, 1, 128, 56, 1),
        (128, 128, 3, 2, 1, 128, 56, 1),
        (256, 256, 3, 1, 1, 256, 28, 1),
        (256, 256, 3, 2, 1, 256, 28, 1),
        (512, 512, 3, 1, 1, 512, 14, 5),
        (512, 512, 3, 2, 1, 512, 14, 1),
        (1024, 1024, 3, 1, 1, 1024, 7, 1),
    ],
    "MobileNetV2": [
        (3, 32, 3, 2, 1, 1, 224, 1),
        (32, 32, 3, 1, 1, 32, 112, 1),
        (96, 96, 3, 2, 1, 96, 112, 1),
        (144, 144, 3, 1, 1, 144, 56, 1),
        (144, 144, 3, 2, 1, 144, 56, 1),
        (192, 192, 3, 1, 1, 192, 28, 2),
        (192, 192, 3, 2, 1, 192, 28, 1),
        (384, 384, 3, 1, 1, 384, 14, 4),
        (576, 576, 3, 1, 1, 576, 14, 2),
        (576, 576, 3, 2, 1, 576, 14, 1),
        (960, 960, 3, 1, 1, 960, 7, 3),
    ],
    "MobileNetV3-L": [
        (3, 16, 3, 2, 1, 1, 224, 1),
        (16, 16, 3, 1, 1, 16, 112, 1),
        (64, 64, 3, 2, 1, 64, 112, 1),
        (72, 72, 3, 1, 1, 72, 56, 1),
        (72, 72, 5, 2, 2, 72, 56, 1),
        (120, 120, 5, 1, 2, 120, 28, 2),
        (240, 240, 3, 2, 1, 240, 28, 1),
        (200, 200, 3, 1, 1, 200, 14, 1),
        (184, 184, 3, 1, 1, 184, 14, 2),
        (480, 480, 3, 1, 1, 480, 14, 1),
        (672, 672, 3, 1, 1, 672, 14, 1),
        (672, 672, 5, 2, 2, 672, 14, 1),
        (960, 960, 5, 1, 2, 960, 7, 2),
    ],
    # Without its 2x2 downsampling convolutions, which are smaller than map_size 3 and so are not refocused.
    "ConvNeXt-T": [
        (3, 96, 4, 4, 0, 1, 224, 1),
        (96, 96, 7, 1, 3, 96, 56, 3),
        (192, 192, 7, 1, 3, 192, 28, 3),
        (384, 384, 7, 1, 3, 384, 14, 9),
        (768, 768, 7, 1, 3, 768, 7, 3),
    ],
    "ShuffleNetV2": [
        (3, 24, 3, 2, 1, 1, 224, 1),
        (24, 24, 3, 2, 1, 24, 56, 1),
        (58, 58, 3, 2, 1, 58, 56, 1),
        (58, 58, 3, 1, 1, 58, 28, 3),
        (116, 116, 3, 2, 1, 116, 28, 2),
        (116, 116, 3, 1, 1, 116, 14, 7),
        (232, 232, 3, 2, 1, 232, 14, 2),
        (232, 232, 3, 1, 1, 232, 7, 3),
    ],
    "EfficientNet-B0": [
        (3, 32, 3, 2, 1, 1, 224, 1),
        (32, 32, 3, 1, 1, 32, 112, 1),
        (96, 96, 3, 2, 1, 96, 112, 1),
        (144, 144, 3, 1, 1, 144, 56, 1),
        (144, 144, 5, 2, 2, 144, 56, 1),
        (240, 240, 5, 1, 2, 240, 28, 1),
        (240, 240, 3, 2, 1, 240, 28, 1),
        (480, 480, 3, 1, 1, 480, 14, 2),
        (480, 480, 5, 1, 2, 480, 14, 1),
        (672, 672, 5, 1, 2, 672, 14, 2),
        (672, 672, 5, 2, 2, 672, 14, 1),
        (1152, 1152, 5, 1, 2, 1152, 7, 3),
        (1152, 1152, 3, 1, 1, 1152, 7, 1),
    ],
    "ResNet-18": [
        (3, 64, 7, 2, 3, 1, 224, 1),
        (64, 64, 3, 1, 1, 1, 56, 4),
        (64, 128, 3, 2, 1, 1, 56, 1),
        (128, 128, 3, 1, 1, 1, 28, 3),
        (128, 256, 3, 2, 1, 1, 28, 1),
        (256, 256, 3, 1, 1, 1, 14, 3),
        (256, 512, 3, 2, 1, 1, 14, 1),
        (512, 512, 3, 1, 1, 1, 7, 3),
    ],
    "ResNet-50": [
        (3, 64, 7, 2, 3, 1, 224, 1),
        (64, 64, 3, 1, 1, 1, 56, 3),
        (128, 128, 3, 2, 1, 1, 56, 1),
        (128, 128, 3, 1, 1, 1, 28, 3),
        (256, 256, 3, 2, 1, 1, 28, 1),
        (256, 256, 3, 1, 1, 1, 14, 5),
        (512, 512, 3, 2, 1, 1, 14, 1),
        (512, 512, 3, 1, 1, 1, 7, 2),
    ],
    "ResNeXt-50": [
        (3, 64, 7, 2, 3, 1, 224, 1),
        (128, 128, 3, 1, 1, 32, 56, 3),
        (256, 256, 3, 2, 1, 32, 56, 1),
        (256, 256, 3, 1, 1, 32, 28, 3),
        (512, 512, 3, 2, 1, 32, 28, 1),
        (512, 512, 3, 1, 1, 32, 14, 5),
        (1024, 1024, 3, 2, 1, 32, 14, 1),
        (1024, 1024, 3, 1, 1, 32, 7, 2),
    ],
}


@dataclass(frozen=True)
class Layer:
    """One convolution of a network, in ``nn.Conv2d``'s words; sizes in pixels. Measured without its bias.

    ``height`` and ``width`` are the input's, ``count`` is how often the network has this layer.
    """

    network: str
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    padding: int
    groups: int
    height: int
    width: int
    count: int

    @property
    def case(self) -> str:
        """``"depthwise"``, ``"groupwise"`` or ``"dense"``."""
        if self.groups == 1:
            return "dense"
        return "depthwise" if self.groups == self.in_channels else "groupwise"

    @property
    def is_stem(self) -> bool:
        """Whether the input is the image, which needs no gradient."""
        return self.in_channels == 3

    @property
    def weight_label(self) -> str:
        """The shape of the weight, as in ``dw144_k3``, ``128x128g32_k3``, ``64x128_k3``."""
        if self.case == "depthwise":
            return f"dw{self.out_channels}_k{self.kernel_size}"
        groups = "" if self.groups == 1 else f"g{self.groups}"
        return f"{self.in_channels}x{self.out_channels}{groups}_k{self.kernel_size}"

    @property
    def label(self) -> str:
        """The shape of the layer, as in ``dw144_k3s1_56x56``."""
        return f"{self.weight_label}s{self.stride}_{self.height}x{self.width}"

    def _elements(self, batch: int) -> tuple[int, int, int]:
        """Elements of the input, of the output, and of the basis weights."""
        outputs = [
            (size + 2 * self.padding - self.kernel_size) // self.stride + 1 for size in (self.height, self.width)
        ]
        return (
            batch * self.in_channels * self.height * self.width,
            batch * self.out_channels * outputs[0] * outputs[1],
            self.out_channels * self.in_channels // self.groups * self.kernel_size**2,
        )

    def refocus_elements(self, map_size: int = 3) -> int:
        """Elements of the refocusing weights ``W_r``, ``[N, groups, k, k]``."""
        return self.out_channels * self.in_channels * map_size**2

    def transform_bytes(self, itemsize: int, backward: bool) -> int:
        """Bytes that the Refocusing Transformation must move.

        Forward: read ``W_r`` and ``W_b``, write ``W_t``. Backward on top: read ``dW_t`` and ``W_b``, write ``dW_r``.
        """
        one_way = self.refocus_elements() + 2 * self._elements(1)[2]
        return itemsize * one_way * (2 if backward else 1)

    def layer_bytes(self, batch: int, itemsize: int, backward: bool, refocused: bool) -> int:
        """Bytes that the layer must move, each tensor once per pass.

        Forward: read ``x`` and the weights, write ``y``. Backward on top: read ``x``, ``dy`` and the kernel, write
        ``dx`` and the weights' gradient. With ``refocused`` the weights are ``W_r``, and the kernel is made of
        ``W_b``; otherwise the weights are the kernel.
        """
        x, y, kernel = self._elements(batch)
        weights = self.refocus_elements() if refocused else 0
        total = x + y + kernel + weights
        if backward:
            total += x + y + kernel + (weights if refocused else kernel) + (0 if self.is_stem else x)
        return itemsize * total


LAYERS: tuple[Layer, ...] = tuple(
    Layer(network, *row[:6], height=row[6], width=row[6], count=row[7])
    for network, rows in _TABLE.items()
    for row in rows
)


def distinct(weight_only: bool = False) -> dict[Layer, dict[str, int]]:
    """Each shape once, with the networks that have it and how often: ``{layer: {network: count}}``.

    The ``network`` of such a layer is empty and its ``count`` 1. ``weight_only`` tells layers apart by the shape of
    their weight alone, so stride and sizes are then those of one of them.
    """
    found: dict[str, tuple[Layer, dict[str, int]]] = {}
    for layer in LAYERS:
        key = layer.weight_label if weight_only else layer.label
        _, networks = found.setdefault(key, (replace(layer, network="", count=1), {}))
        networks[layer.network] = networks.get(layer.network, 0) + layer.count
    return dict(found.values())
