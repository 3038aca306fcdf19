"""RefConv without state: validated functions over tensors.

Everything here is differentiable to any order with respect to every tensor argument, follows autocast, and
runs on the backend that :func:`refconv_kernels.use_backend` or ``REFCONV_BACKEND`` chooses.
"""

from refconv_kernels.functional.convolution import conv2d
from refconv_kernels.functional.layers import refconv2d, thin_refconv2d
from refconv_kernels.functional.weights import refocus_factor, refocus_weight, thin_refocus_weight

__all__ = ["conv2d", "refconv2d", "refocus_factor", "refocus_weight", "thin_refconv2d", "thin_refocus_weight"]
