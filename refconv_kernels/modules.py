"""``RefConv2d``: the layer's state. What it computes is in :mod:`refconv_kernels.functional`."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from refconv_kernels import checkpoints, functional, thin
from refconv_kernels.autocast import no_autocast
from refconv_kernels.autograd import KnownWeight, apply
from refconv_kernels.checks import check_groups, check_map_size, check_padding, is_all_zero, pair
from refconv_kernels.kept import KeptWeight
from refconv_kernels.ops import still_chosen
from refconv_kernels.transforms import RefocusingTransformation, ThinRefocusingTransformation

__all__ = ["RefConv2d"]

FORMS = ("full", "thin")
BASES = ("frozen", "trainable")
_FORM_OF: dict[type, str] = {RefocusingTransformation: "full", ThinRefocusingTransformation: "thin"}
_READ_ONLY = (
    "RefConv2d.weight is computed from basis_weight and transform, so it cannot be set: "
    "fold first (layer.fuse() or refconv_kernels.reparameterize(model))"
)
_HOOKS = (  # what a user may have registered on a convolution; the dictionaries move as they are
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class RefConv2d(nn.Module):
    """A convolution that trains a transformation of its frozen kernel: ``y = conv2d(x, T(W_b, W_r))``.

    ``W_t = W_b * W_r + W_b`` (RefConv, Eq. 1). The basis weights ``W_b`` come from a pretrained convolution
    and stay frozen; the refocusing weights ``W_r`` are trained; afterwards :meth:`fuse` stores ``W_t`` in a
    plain :class:`torch.nn.Conv2d`. Everywhere else the layer behaves like :class:`torch.nn.Conv2d`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as in
            :class:`torch.nn.Conv2d`, sizes in pixels.
        map_size: ``k``, the odd size of the refocusing weights' windows, at most the kernel's smaller side.
        form: ``"full"``, parameter ``W_r`` as in the paper, or ``"thin"``, its coordinates ``E``: the same training,
            for SGD, with as few parameters as the plain convolution (docs/numerics.md). Where ``W_r`` has no more
            numbers than ``E`` would have, ``groups * map_size**2 <= K_h * K_w`` (dense layers), the two are one.
        init: initial ``W_r``: ``"xavier"``, ``"xavier_normal"``, ``"zeros"`` (then ``W_t = W_b`` at first),
            ``"kaiming"`` or ``"xavier_grouped"``; see :class:`~refconv_kernels.transforms.RefocusingTransformation`.
        identity: add ``W_b`` in Eq. 1; False is the paper's "w/o shortcut".
        basis: ``"frozen"``, or ``"trainable"`` for the paper's ablation. This sets ``requires_grad`` of
            ``basis_weight``, which later calls of ``requires_grad_`` change like any other parameter's.
        transform: any module that maps the basis to a tensor of the same shape and dtype, instead of the
            default transformation that ``map_size``, ``form``, ``init`` and ``identity`` describe.
        device, dtype: of the parameters.

    Attributes:
        basis_weight: ``W_b``, ``[C_out, C_in/groups, K_h, K_w]``.
        transform: the Refocusing Transformation; its parameter is ``transform.weight``, ``W_r [N, groups, k, k]`` or
            ``E [N, r]``.
        form: the form that the layer has, None for a ``transform`` of the user's.
        bias: ``[C_out]`` or None; trained.

    Input ``[B, C_in, H, W]`` or ``[C_in, H, W]``; output as from :class:`torch.nn.Conv2d`.

    ``load_state_dict`` also takes a plain convolution's ``weight`` and ``bias`` (``weight`` becomes the basis,
    the transformation stays as it is) and a checkpoint of the authors' module (``weight``, ``convmap.weight``).

    In eval mode without gradients ``W_t`` is computed once and kept until a parameter changes. A write through
    ``parameter.data`` is invisible to PyTorch's version counter; call ``layer.eval()`` after one.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.

    Example:
        >>> layer = RefConv2d(64, 64, 3, padding=1, groups=64)
        >>> layer(torch.randn(2, 64, 14, 14)).shape
        torch.Size([2, 64, 14, 14])
        >>> layer.fuse()
        Conv2d(64, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=64)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        map_size: int = 3,
        form: str = "full",
        init: str = "xavier",
        identity: bool = True,
        basis: str = "frozen",
        transform: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_groups(groups)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
                raise ValueError(f"{name} (={channels!r}) must be a positive int")
            if channels % groups != 0:
                raise ValueError(f"{name} (={channels}) must be divisible by groups (={groups})")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = pair("kernel_size", kernel_size, 1)
        self.stride = pair("stride", stride, 1)
        self.dilation = pair("dilation", dilation, 1)
        check_padding(padding, padding_mode, self.stride)
        self.padding = padding if isinstance(padding, str) else pair("padding", padding, 0)
        self.padding_mode = padding_mode
        self.transposed, self.output_padding = False, (0, 0)  # read by code that handles nn.Conv2d
        if form not in FORMS:
            raise ValueError(f"form (={form!r}) must be one of {FORMS}")
        if basis not in BASES:
            raise ValueError(f"basis (={basis!r}) must be one of {BASES}")

        shape = (out_channels, in_channels // groups, *self.kernel_size)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.basis_weight = nn.Parameter(torch.empty(shape, **factory), requires_grad=basis == "trainable")
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, **factory))
        else:
            self.register_parameter("bias", None)
        if transform is None:
            check_map_size(map_size)
            if map_size > min(self.kernel_size):
                raise ValueError(f"map_size (={map_size}) must be at most the kernel_size (={self.kernel_size})")
        elif not isinstance(transform, nn.Module):
            raise TypeError(f"transform (={transform!r}) must be a torch.nn.Module")
        elif (map_size, form, init, identity) != (3, "full", "xavier", True):
            raise ValueError(
                f"map_size (={map_size}), form (={form!r}), init (={init!r}) and identity (={identity}) describe "
                "the default transformation; leave them out when transform is given"
            )
        self._folded_requires_grad = True  # of the weight that fuse() returns
        self._kept: KeptWeight | None = None  # in eval mode
        self._ahead: tuple[KeptWeight, str] | None = None  # from an optimizer, for the next forward
        self._reset_convolution()
        if transform is not None:
            self.transform = transform
        elif form == "thin" and thin.is_smaller(groups, map_size, self.basis_weight[0, 0].numel()):
            self.transform = ThinRefocusingTransformation(
                self.basis_weight.detach(), groups, map_size, init=init, identity=identity
            )
            if basis == "trainable":
                warnings.warn(
                    "form='thin' with basis='trainable' is another model than form='full': its factor stays "
                    "that of the first basis (docs/numerics.md)",
                    stacklevel=2,
                )
        else:
            kernels = out_channels * in_channels // groups
            self.transform = RefocusingTransformation(
                kernels, groups, map_size, init=init, identity=identity, **factory
            )

    @property
    def form(self) -> str | None:
        """``"full"`` or ``"thin"``; None for a ``transform`` of the user's."""
        return _FORM_OF.get(type(self.transform))

    def reset_parameters(self) -> None:
        """Draw basis and bias as :class:`torch.nn.Conv2d` does, and the transformation as it defines."""
        self._reset_convolution()
        self._reset_transform()

    def _reset_convolution(self) -> None:
        nn.init.kaiming_uniform_(self.basis_weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.basis_weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def _reset_transform(self) -> None:
        if isinstance(self.transform, ThinRefocusingTransformation):
            self.transform.draw(self.basis_weight)
            return
        for module in self.transform.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()

    # --- conversion ---------------------------------------------------------------------------------------

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, **options: Any) -> RefConv2d:
        """A layer whose basis is a copy of ``conv``'s weight; bias, attributes, layout, hooks and mode follow.

        Args:
            conv: a plain :class:`torch.nn.Conv2d`, not a subclass, with a kernel that is not all zeros.
            options: the keyword-only arguments of :class:`RefConv2d`, without ``device`` and ``dtype``.

        Raises:
            TypeError: ``conv`` is not a plain convolution.
            ValueError: an option does not fit, or the kernel is all zeros.
        """
        if type(conv) is not nn.Conv2d:
            raise TypeError(f"conv (={type(conv).__name__}) must be exactly torch.nn.Conv2d; a subclass may differ")
        if is_all_zero(conv.weight):
            raise ValueError("conv.weight is all zeros: a frozen zero basis stays zero and gets no gradient")
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",
            dtype=conv.weight.dtype,
            **options,
        )
        trainable = layer.basis_weight.requires_grad
        layer.basis_weight = nn.Parameter(conv.weight.detach().clone(), requires_grad=trainable)
        if conv.bias is not None:
            layer.bias = nn.Parameter(conv.bias.detach().clone(), requires_grad=conv.bias.requires_grad)
        if options.get("transform") is None:
            layer.transform.to_empty(device=conv.weight.device)
            layer._reset_transform()
        layer._folded_requires_grad = conv.weight.requires_grad
        return like(conv, layer)

    def fuse(self) -> nn.Conv2d:
        """A plain :class:`torch.nn.Conv2d` holding ``W_t``: the same function, attributes, layout and mode.

        bfloat16 and float16 parameters are combined in float32 and rounded once.
        """
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,  # type: ignore[arg-type]
            device="meta",
        )
        with torch.no_grad():
            weight = torch.empty_like(self.basis_weight).copy_(self.weight)  # in the layout of the basis
            conv.weight = nn.Parameter(weight, requires_grad=self._folded_requires_grad)
            if self.bias is not None:
                conv.bias = nn.Parameter(self.bias.clone(), requires_grad=self.bias.requires_grad)
        return like(self, conv)

    # --- computation --------------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """``W_t``, computed anew at each access; read-only: writing into the result changes nothing."""
        with no_autocast(self.basis_weight):
            weight = self.transform(self.basis_weight)
        basis = self.basis_weight
        if weight.shape != basis.shape or weight.dtype != basis.dtype:
            raise ValueError(
                f"transform returned {tuple(weight.shape)}, {weight.dtype}, but must keep the basis' shape and "
                f"dtype, {tuple(basis.shape)}, {basis.dtype}"
            )
        return weight

    def forward(self, input: Tensor) -> Tensor:
        # nn.Module looks attributes up in Python, which between convolutions takes microseconds for each. What is
        # parametrized is not among the parameters.
        parameters: Any = self._parameters
        transform: Any = self._modules["transform"]
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        geometry: Any = bias, self.stride, self.padding, self.dilation, self.groups
        if not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            return functional.conv2d(input, self._kept_weight(), *geometry, padding_mode=self.padding_mode)
        ahead = self._weight_ahead()
        if ahead is not None:
            try:
                if self.padding_mode == "zeros" and self.groups == 1 < self.in_channels:  # microseconds less
                    return nn.functional.conv2d(input, ahead, *geometry)
            except (RuntimeError, TypeError):
                pass  # below it says what is wrong
            return functional.conv2d(input, ahead, *geometry, padding_mode=self.padding_mode)
        form = _FORM_OF.get(type(transform))
        if form is None or any(map(vars(transform).get, _HOOKS)):
            return functional.conv2d(input, self.weight, *geometry, padding_mode=self.padding_mode)
        basis: Any = parameters["basis_weight"] if "basis_weight" in parameters else self.basis_weight  # noqa: SIM401
        weight: Any = transform._parameters["weight"]
        options: dict[str, Any] = {"padding_mode": self.padding_mode, "identity": transform.identity}
        if form == "thin":
            factor: Any = transform._buffers["factor"]
            return functional.thin_refconv2d(input, basis, weight, factor, *geometry, **options)
        return functional.refconv2d(input, basis, weight, *geometry, **options)

    def _kept_weight(self) -> Tensor:
        sources = [self.basis_weight, *self.transform.parameters(), *self.transform.buffers()]
        if self._kept is None or not self._kept.is_of(sources):
            weight = self.weight
            self._kept = KeptWeight.of(weight, sources)
            return weight
        return self._kept.weight

    def keep_ahead(self, weight: Tensor, backend: str) -> None:
        """Take ``W_t`` of the parameters as they are now, ``[C_out, C_in/groups, K_h, K_w]``, from an optimizer that
        computed it with ``backend``. Training uses it until a parameter changes, and leaves the optimizer ``dW_t``
        (:class:`~refconv_kernels.autograd.DeferredGradient`). For a layer that :meth:`takes_ahead`."""
        basis, refocus = self.basis_weight, self.transform.weight
        with torch.enable_grad():  # its place in the graph too: between the convolutions of a forward it costs more
            known = apply(KnownWeight, basis, refocus, weight, backend)
        kept = KeptWeight.of(known, (basis, refocus)) if known.requires_grad else None  # type: ignore[arg-type]
        vars(self)["_ahead"] = None if kept is None else (kept, backend)  # a tenth of what nn.Module takes for it

    def takes_ahead(self) -> bool:
        """Whether ``W_t`` may come from elsewhere: the full form, a frozen basis, and no hook on the transformation."""
        return _takes_ahead(self.transform, self.basis_weight)

    def _weight_ahead(self) -> Tensor | None:
        """``W_t`` as an optimizer left it; None where it must be computed."""
        if torch.compiler.is_compiling() or self._ahead is None:  # the compiler must not depend on what changes
            return None
        transform: Any = self.transform  # by now it may be one without a weight
        basis, (kept, backend) = self.basis_weight, self._ahead
        if not _takes_ahead(transform, basis) or not kept.is_of((basis, transform.weight)):
            self._ahead = None
            return None
        requires_grad = torch.is_grad_enabled() and transform.weight.requires_grad
        if not requires_grad or torch._C._are_functorch_transforms_active():
            return None
        return kept.weight if still_chosen(backend) else None

    # --- state --------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> RefConv2d:
        self._kept = self._ahead = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> RefConv2d:
        self._kept = self._ahead = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "_ahead": None}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(_READ_ONLY)
        super().__setattr__(name, value)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As :meth:`torch.nn.Module.load_state_dict`; when it raises, the layer is as it was."""
        before = {name: (tensor, tensor.detach().clone()) for name, tensor in self.state_dict(keep_vars=True).items()}
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except Exception:
            for name, (tensor, value) in before.items():
                owner, _, leaf = name.rpartition(".")
                with torch.no_grad():
                    tensor.copy_(value)
                if assign:
                    setattr(self.get_submodule(owner), leaf, tensor)
            raise

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._kept = self._ahead = None
        errors = checkpoints.prepare(self, state_dict, prefix, bool(local_metadata.get("assign_to_params_buffers")))
        if errors:
            error_msgs.extend(errors)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1), ("padding_mode", "zeros")):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)!r}"
        text += "" if self.bias is not None else ", bias=False"
        return text + (", basis='trainable'" if self.basis_weight.requires_grad else "")


def _takes_ahead(transform: nn.Module, basis: Tensor) -> bool:
    hooked = any(map(vars(transform).get, _HOOKS))
    return _FORM_OF.get(type(transform)) == "full" and not hooked and not basis.requires_grad


def like(source: nn.Module, target: Any) -> Any:
    """``target`` with the mode and the hooks of ``source``, the module whose place it takes."""
    target.training = source.training
    for module in target.children():
        module.train(source.training)
    for name in _HOOKS:
        setattr(target, name, copy.copy(getattr(source, name)))
    return target
