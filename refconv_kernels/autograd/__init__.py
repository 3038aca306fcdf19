"""Autograd Functions over the raw forward and backward operators.

Each operator is linear in each of its tensors, so the backward of a backward is again the same operator with
other arguments; those second derivatives take the reference path, which PyTorch differentiates to any
order. A backward that nobody differentiates calls its operator directly. ``setup_context`` and ``vmap`` make
the Functions work under ``torch.func``. There is no ``jvp``, because ``torch.compile`` refuses Functions that
have one: :func:`refconv_kernels.ops.choose` sends forward-mode differentiation to the reference path.
"""

from refconv_kernels.autograd.calls import apply
from refconv_kernels.autograd.convolution import GroupedConv2d
from refconv_kernels.autograd.deferred import DeferredGradient, KnownWeight
from refconv_kernels.autograd.layers import RefConv2d, ThinRefConv2d
from refconv_kernels.autograd.weights import RefocusWeight, ThinRefocusWeight

__all__ = [
    "DeferredGradient",
    "GroupedConv2d",
    "KnownWeight",
    "RefConv2d",
    "RefocusWeight",
    "ThinRefConv2d",
    "ThinRefocusWeight",
    "apply",
]
