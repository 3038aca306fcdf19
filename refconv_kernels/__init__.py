"""RefConv, the reparameterized refocusing convolution, with fused kernels for PyTorch."""

from refconv_kernels import functional
from refconv_kernels.convert import refocus, reparameterize
from refconv_kernels.forms import full_to_thin, thin_to_full
from refconv_kernels.modules import RefConv2d
from refconv_kernels.ops import current_backend, use_backend
from refconv_kernels.optim import FoldedAdamW, FusedSGD
from refconv_kernels.summary import summary
from refconv_kernels.transforms import RefocusingTransformation, ThinRefocusingTransformation
from refconv_kernels.variants import VARIANTS, ParallelRefocusing, StackedRefocusing, variant

__all__ = [
    "VARIANTS",
    "FoldedAdamW",
    "FusedSGD",
    "ParallelRefocusing",
    "RefConv2d",
    "RefocusingTransformation",
    "StackedRefocusing",
    "ThinRefocusingTransformation",
    "current_backend",
    "full_to_thin",
    "functional",
    "refocus",
    "reparameterize",
    "summary",
    "thin_to_full",
    "use_backend",
    "variant",
]
__version__ = "0.1.0"
