"""What is compared: the plain convolution, RefConv as two PyTorch convolutions, and this library's in both forms."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.nn import functional as F

from refconv_kernels import RefConv2d, full_to_thin, refocus, reparameterize, thin

FORMULATIONS = ("plain", "two_convolutions", "ours", "thin")  # ours is the full form, thin ours in the thin form


class TwoConvolutions(nn.Module):
    """RefConv as its paper writes it (Eq. 1 and 2) and as its authors run it: two calls of PyTorch's convolution.

    ``W_t = W_b * W_r + W_b`` is a convolution over the 2-D kernels of ``W_b`` as the channels of an image of batch 1,
    ``y = conv2d(x, W_t)`` one over the features. The names of parameters are :class:`RefConv2d`'s.
    """

    def __init__(self, conv: nn.Conv2d, map_size: int = 3) -> None:
        super().__init__()
        self.geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        self.register_buffer("basis_weight", conv.weight.detach().clone())
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone())
        kernels, groups = conv.out_channels * conv.in_channels // conv.groups, conv.groups
        self.transform = nn.Conv2d(
            kernels,
            kernels,
            map_size,
            padding=map_size // 2,
            groups=kernels // groups,
            bias=False,
            dtype=conv.weight.dtype,
        )

    def transformed_weight(self) -> Tensor:
        """``W_t``, ``[C_out, C_in/g, K_h, K_w]``."""
        basis = self.basis_weight
        return basis + self.transform(basis.reshape(1, -1, *basis.shape[2:])).reshape(basis.shape)

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.transformed_weight(), self.bias, *self.geometry)


class _MatrixProduct(nn.Module):
    """A stride-1, same-size grouped convolution as one matrix product per group.

    For float64, where PyTorch's convolution loops over its groups: a dense layer's transformation has many thousands.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = conv.weight

    def forward(self, image: Tensor) -> Tensor:
        _, group_size, map_size, _ = self.weight.shape
        row = group_size * map_size**2
        patches = F.unfold(image, map_size, padding=map_size // 2)
        product = self.weight.view(-1, group_size, row) @ patches.view(-1, row, patches.shape[-1])
        return product.view_as(image)


def layer_formulations(conv: nn.Conv2d) -> dict[str, nn.Module]:
    """All formulations with the ``W_b`` of ``conv`` and one ``W_r``; all compute the same function.

    ``plain`` holds ``W_t``. Formulations share no memory.
    """
    two_convolutions = TwoConvolutions(conv)
    ours = RefConv2d.from_conv(conv)
    ours.load_state_dict(two_convolutions.state_dict())
    in_thin_form = full_to_thin(ours)
    return {"plain": ours.fuse(), "two_convolutions": two_convolutions, "ours": ours, "thin": in_thin_form}


def network_formulations(model: nn.Module) -> dict[str, nn.Module]:
    """As :func:`layer_formulations`, for every convolution of a network that :func:`~refconv_kernels.refocus` takes."""
    ours = refocus(model)
    refocused = {name for name, module in ours.named_modules() if isinstance(module, RefConv2d)}
    two_convolutions = with_two_convolutions(model, refocused)
    ours.load_state_dict(two_convolutions.state_dict())
    plain, in_thin_form = reparameterize(ours), full_to_thin(ours)
    return {"plain": plain, "two_convolutions": two_convolutions, "ours": ours, "thin": in_thin_form}


def with_two_convolutions(model: nn.Module, names: set[str]) -> nn.Module:
    """A copy of ``model`` with :class:`TwoConvolutions` in place of the convolutions called ``names``."""
    model = copy.deepcopy(model)
    for name in names:
        model.set_submodule(name, TwoConvolutions(model.get_submodule(name)))
    return model


def as_full(module: nn.Module, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by name, those of the thin form's coordinates as the full form's: ``dW_r = dE Q^T``."""
    result = dict(gradients)
    for name, layer in module.named_modules():
        key = f"{name}.transform.weight".removeprefix(".")
        if isinstance(layer, RefConv2d) and layer.form == "thin" and key in result:
            map_size = layer.transform.map_size
            rotation, _ = thin.decompose(layer.basis_weight, layer.groups, map_size)
            result[key] = thin.lift(result[key], rotation, map_size)
    return result


def float64_reference(two_convolutions: nn.Module) -> nn.Module:
    """A float64 copy of a module made of :class:`TwoConvolutions`."""
    model = copy.deepcopy(two_convolutions).double()
    for module in list(model.modules()):
        if isinstance(module, TwoConvolutions):
            module.transform = _MatrixProduct(module.transform)
    return model
