"""Validation with messages for people: the argument, its value and the rule. Imports only torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """``value`` as ``(height, width)``; each at least ``least``."""
    try:
        both = (value, value) if isinstance(value, int) else tuple(value)
    except TypeError:
        both = ()
    if len(both) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in both):
        raise ValueError(f"{name} (={value!r}) must be an int of at least {least}, or two of them")
    return both


def check_groups(groups: int) -> None:
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise ValueError(f"groups (={groups!r}) must be a positive int")


def check_padding(padding: int | Sequence[int] | str, padding_mode: str, stride: tuple[int, int]) -> None:
    """Raise unless ``padding`` and ``padding_mode`` are what :class:`torch.nn.Conv2d` accepts."""
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode (={padding_mode!r}) must be one of {PADDING_MODES}")
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding (={padding!r}) must be 'same', 'valid', an int, or two of them")
        if padding == "same" and stride != (1, 1):
            raise ValueError(f"padding='same' needs stride 1, got stride (={stride})")
    else:
        pair("padding", padding, 0)


def check_tensors(**tensors: object) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} (={value!r}) must be a torch.Tensor")
        if not (value.is_floating_point() or value.is_complex()):
            raise TypeError(f"{name}.dtype (={value.dtype}) must be a floating-point or complex type")


def check_model(model: object) -> None:
    """Raise unless an optimizer can look up layers in ``model``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model (={model!r}) must be the torch.nn.Module whose parameters are trained")


def check_dims(name: str, tensor: Tensor, dims: int, shape: str) -> None:
    if tensor.dim() != dims:
        raise ValueError(f"{name}.shape (={tuple(tensor.shape)}) must be {shape}")


def check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name}.dtype (={tensor.dtype}) must be the dtype of {other_name} (={other.dtype})")
    if tensor.device != other.device:
        raise ValueError(f"{name}.device (={tensor.device}) must be the device of {other_name} (={other.device})")


def check_map_size(map_size: int) -> None:
    if not isinstance(map_size, int) or isinstance(map_size, bool) or map_size < 1 or map_size % 2 == 0:
        raise ValueError(f"map_size (={map_size!r}) must be a positive odd int")


def check_basis(basis: Tensor, groups: int, map_size: int) -> None:
    """Raise unless there is a thin form of a RefConv with this basis."""
    check_tensors(basis=basis)
    check_dims("basis", basis, 4, "[C_out, C_in/g, K_h, K_w]")
    if basis.is_complex():
        raise TypeError(f"basis.dtype (={basis.dtype}) must be a real floating-point type: the thin form has no other")
    check_groups(groups)
    check_map_size(map_size)
    if basis.shape[0] * basis.shape[1] % groups != 0:
        raise ValueError(
            f"basis has {basis.shape[0] * basis.shape[1]} 2-D kernels, which groups (={groups}) must divide"
        )


def is_all_zero(tensor: Tensor) -> bool:
    """Whether a kernel can be no basis: what is frozen at zero stays zero and gets no gradient."""
    return not tensor.is_meta and not bool(tensor.detach().count_nonzero())
