"""The more complex Refocusing Transformations of the paper's Table VII (Eq. 3 to 8)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refconv_kernels.autocast import HALVES, no_autocast
from refconv_kernels.checks import check_map_size, check_same, check_tensors
from refconv_kernels.functional import refocus_weight
from refconv_kernels.geometry import output_format
from refconv_kernels.transforms import RefocusingTransformation, check_transformation, draw_refocus

__all__ = ["VARIANTS", "ParallelRefocusing", "SqueezeExcitation", "StackedRefocusing", "variant"]

ATTENTION_LIMIT = 2**27  # parameters, 512 MiB in float32: depthwise layers pass, 512x512 dense ones would need 128 GiB


class ParallelRefocusing(nn.Module):
    """``T(W_b) = W_b * W_r^1 + ... + W_b * W_r^n + W_b`` (RefConv, Eq. 3 and 4): the paper's 2B1L and 3B1L.

    Its parameters are ``weights``, ``n`` refocusing weights ``[N, g, k, k]`` with ``N = C_out * C_in/g``. The sum is
    linear in them: under SGD it trains like one branch that holds their sum, with ``n`` times the learning rate.

    Args:
        kernels, group_size, map_size, identity: as in :class:`~refconv_kernels.RefocusingTransformation`.
        branches: ``n``, at least 1.
        init: of each branch, as in :class:`~refconv_kernels.RefocusingTransformation`.
        device, dtype: of the parameters.

    Basis ``[C_out, C_in/g, K_h, K_w]``; the result has its shape, dtype and memory format. bfloat16 and float16 are
    computed in float32 and rounded once; autocast does not apply.

    Raises:
        ValueError: no branches, an even ``map_size``, an unknown ``init``, or sizes that do not divide.

    Example:
        >>> transform = ParallelRefocusing(8, 8, branches=3)
        >>> len(transform.weights), transform(torch.randn(8, 1, 3, 3)).shape
        (3, torch.Size([8, 1, 3, 3]))
    """

    def __init__(
        self,
        kernels: int,
        group_size: int,
        map_size: int = 3,
        *,
        branches: int = 2,
        init: str = "xavier",
        identity: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_transformation(kernels, group_size, map_size, init)
        _check_count("branches", branches)
        self.map_size, self.init, self.identity = map_size, init, identity
        shape = (kernels, group_size, map_size, map_size)
        self.weights = _parameters(branches, shape, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every branch anew by ``init``."""
        for weight in self.weights:
            draw_refocus(weight, self.init)

    def forward(self, basis: Tensor) -> Tensor:
        _check_same_kind(self, basis)
        with no_autocast(basis):
            wide, (first, *others) = _widen(basis), [_widen(weight) for weight in self.weights]
            transformed = refocus_weight(wide, first, identity=self.identity)
            for weight in others:
                transformed = transformed + refocus_weight(wide, weight, identity=False)
            return _like(basis, transformed)

    def extra_repr(self) -> str:
        return _describe(self, f"branches={len(self.weights)}")


class StackedRefocusing(nn.Module):
    """``T(W_b) = f(W_b * W_r^1) * W_r^2 + W_b`` (RefConv, Eq. 5 to 8): layers one after the other.

    ``f`` is nothing (Eq. 5, the paper's 1B2L), an exact GELU (Eq. 6, 1B2L+Act) or a :class:`SqueezeExcitation`
    (Eq. 8, 1B2L+SE); with one layer, ``T(W_b) = f(W_b * W_r) + W_b`` (Eq. 7, 1B1L+SE).

    Its parameters are ``weights``, refocusing weights ``[N, g, k, k]`` per layer with ``N = C_out * C_in/g``, and those
    of ``attention``, which is None without one.

    Args:
        kernels, group_size, map_size, identity: as in :class:`~refconv_kernels.RefocusingTransformation`.
        layers: at least 1.
        after_first: ``f``, after the first layer: None, ``"gelu"`` or ``"se"``.
        init: of each layer, as in :class:`~refconv_kernels.RefocusingTransformation`. With ``"zeros"`` only the last
            layer starts at zero, so that ``W_t = W_b`` at first, and the others by ``"xavier"``: two zero layers
            would have zero gradients for ever. The attention is drawn like :class:`torch.nn.Linear`'s weights.
        device, dtype: of the parameters.

    Basis ``[C_out, C_in/g, K_h, K_w]``; the result has its shape, dtype and memory format. bfloat16 and float16 are
    computed in float32 and rounded once; autocast does not apply.

    Raises:
        ValueError: no layers, an unknown ``after_first`` or ``init``, an even ``map_size``, sizes that do not divide,
            or more 2-D kernels than an attention can serve.

    Example:
        >>> transform = StackedRefocusing(8, 8, after_first="se")
        >>> len(transform.weights), transform(torch.randn(8, 1, 3, 3)).shape
        (2, torch.Size([8, 1, 3, 3]))
    """

    def __init__(
        self,
        kernels: int,
        group_size: int,
        map_size: int = 3,
        *,
        layers: int = 2,
        after_first: str | None = None,
        init: str = "xavier",
        identity: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_transformation(kernels, group_size, map_size, init)
        _check_count("layers", layers)
        if after_first not in (None, "gelu", "se"):
            raise ValueError(f"after_first (={after_first!r}) must be None, 'gelu' or 'se'")
        self.map_size, self.init, self.identity, self.after_first = map_size, init, identity, after_first
        shape = (kernels, group_size, map_size, map_size)
        self.weights = _parameters(layers, shape, device, dtype)
        self.attention = SqueezeExcitation(kernels, device=device, dtype=dtype) if after_first == "se" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every layer anew by ``init``; the attention has a method of its own."""
        *before, last = self.weights
        for weight in before:
            draw_refocus(weight, "xavier" if self.init == "zeros" else self.init)
        draw_refocus(last, self.init)

    def forward(self, basis: Tensor) -> Tensor:
        _check_same_kind(self, basis)
        with no_autocast(basis):
            wide, (first, *others) = _widen(basis), [_widen(weight) for weight in self.weights]
            moved = refocus_weight(wide, first, identity=False)
            if self.attention is not None:
                moved = self.attention(moved)
            elif self.after_first == "gelu":
                moved = F.gelu(moved)
            for weight in others:
                moved = refocus_weight(moved, weight, identity=False)
            return _like(basis, wide + moved if self.identity else moved)

    def extra_repr(self) -> str:
        after = "" if self.after_first is None else f", after_first={self.after_first!r}"
        return _describe(self, f"layers={len(self.weights)}{after}")


class SqueezeExcitation(nn.Module):
    """Channel attention (Hu et al., 2018) with the 2-D kernels as channels, the ``ψ`` of Eq. 7 and 8.

    Each kernel is scaled by ``s = sigmoid(expansion relu(reduction m))``, ``m`` being the kernels' means, ``[N]``.
    The parameters are ``reduction``, ``[r, N]``, and ``expansion``, ``[N, r]``, with ``r = max(1, N // 4)`` and no
    biases, as the parameter counts of Table VII imply.

    Args:
        kernels: ``N``, the number of 2-D kernels.
        device, dtype: of the parameters. Kernels of another dtype are scaled in theirs.

    Kernels ``[C_out, C_in/g, K_h, K_w]``; the result has their shape, dtype and memory format.

    Raises:
        ValueError: so many kernels that the parameters would be too many, as in wide dense layers.

    Example:
        >>> SqueezeExcitation(8)(torch.randn(8, 1, 3, 3)).shape
        torch.Size([8, 1, 3, 3])
    """

    def __init__(
        self, kernels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        reduced = max(1, kernels // 4)
        if 2 * kernels * reduced > ATTENTION_LIMIT:
            raise ValueError(
                f"kernels (={kernels}) would need an attention of 2 * {kernels} * {reduced} = "
                f"{2 * kernels * reduced:,} parameters, but they must be at most {ATTENTION_LIMIT:,}: "
                "use a variant without SE here (a dense layer has C_out * C_in kernels)"
            )
        self.reduction = nn.Parameter(torch.empty(reduced, kernels, device=device, dtype=dtype))
        self.expansion = nn.Parameter(torch.empty(kernels, reduced, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, as :class:`torch.nn.Linear` does."""
        for weight in (self.reduction, self.expansion):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, kernels: Tensor) -> Tensor:
        means = kernels.mean((2, 3)).flatten()
        reduction, expansion = self.reduction.to(kernels.dtype), self.expansion.to(kernels.dtype)
        scale = torch.sigmoid(F.linear(F.relu(F.linear(means, reduction)), expansion))
        return kernels * scale.reshape(*kernels.shape[:2], 1, 1)

    def extra_repr(self) -> str:
        return str(self.reduction.shape[1])


#: The names of Table VII: functions of ``kernels, group_size, map_size`` and the keywords ``init``, ``identity``,
#: ``device`` and ``dtype``. "1B2L+GELU" is the paper's "1B2L+Act".
VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "1B1L": RefocusingTransformation,  # Eq. 1
    "2B1L": partial(ParallelRefocusing, branches=2),  # Eq. 3
    "3B1L": partial(ParallelRefocusing, branches=3),  # Eq. 4
    "1B2L": partial(StackedRefocusing, layers=2),  # Eq. 5
    "1B2L+GELU": partial(StackedRefocusing, layers=2, after_first="gelu"),  # Eq. 6
    "1B1L+SE": partial(StackedRefocusing, layers=1, after_first="se"),  # Eq. 7
    "1B2L+SE": partial(StackedRefocusing, layers=2, after_first="se"),  # Eq. 8
}


def variant(name: str, conv: nn.Conv2d, *, map_size: int = 3, init: str = "xavier", identity: bool = True) -> nn.Module:
    """The Refocusing Transformation of Table VII called ``name``, for the weight of ``conv``.

    Args:
        name: ``"1B1L"`` (the default one, Eq. 1), ``"2B1L"``, ``"3B1L"``, ``"1B2L"``, ``"1B2L+GELU"`` (the paper's
            "1B2L+Act"), ``"1B1L+SE"`` or ``"1B2L+SE"``: a key of ``VARIANTS``.
        conv: gives sizes, groups, device and dtype; not changed, not kept.
        map_size: odd, at most the kernel's smaller side.
        init, identity: as in :class:`~refconv_kernels.RefocusingTransformation`; for ``"zeros"`` see
            :class:`StackedRefocusing`.

    Returns:
        A module that maps basis weights of ``conv.weight``'s shape, dtype and device to transformed ones.

    Raises:
        TypeError: ``conv`` is not an ``nn.Conv2d``.
        ValueError: an unknown ``name`` or ``init``, a ``map_size`` that does not fit, or more 2-D kernels than an
            attention can serve (wide dense layers: keep them out with ``where``).

    Example:
        >>> from refconv_kernels import refocus
        >>> model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8))
        >>> len(refocus(model, transform=lambda conv: variant("2B1L", conv))[0].transform.weights)
        2
    """
    if name not in VARIANTS:
        raise ValueError(f"name (={name!r}) must be one of {tuple(VARIANTS)}")
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"conv (={type(conv).__name__}) must be a torch.nn.Conv2d")
    check_map_size(map_size)
    if map_size > min(conv.kernel_size):
        raise ValueError(f"map_size (={map_size}) must be at most the kernel_size (={tuple(conv.kernel_size)})")
    weight = conv.weight
    kernels = weight.shape[0] * weight.shape[1]
    return VARIANTS[name](
        kernels, conv.groups, map_size, init=init, identity=identity, device=weight.device, dtype=weight.dtype
    )


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} (={value!r}) must be a positive int")


def _check_same_kind(module: nn.Module, basis: Tensor) -> None:
    check_tensors(basis=basis)
    for name, parameter in module.named_parameters():
        check_same(name, parameter, "basis", basis)


def _parameters(
    count: int, shape: tuple[int, ...], device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for _ in range(count))


def _widen(tensor: Tensor) -> Tensor:
    """16-bit tensors in float32, in which all stages are computed: what leaves the last one is rounded once."""
    return tensor.float() if tensor.dtype in HALVES else tensor


def _like(basis: Tensor, transformed: Tensor) -> Tensor:
    return transformed.to(basis.dtype, memory_format=output_format(basis))


def _describe(module: ParallelRefocusing | StackedRefocusing, structure: str) -> str:
    kernels, group_size = module.weights[0].shape[:2]
    text = f"{kernels}, {group_size}, map_size={module.map_size}, {structure}, init={module.init!r}"
    return text if module.identity else text + ", identity=False"
