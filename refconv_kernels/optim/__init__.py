"""Optimizers that know the layer: AdamW for its thin form, and SGD in one pass over the weights."""

from refconv_kernels.optim.folded_adamw import FoldedAdamW
from refconv_kernels.optim.fused_sgd import FusedSGD

__all__ = ["FoldedAdamW", "FusedSGD"]
