"""Measurements against plain convolutions and against the two-convolution formulation of RefConv."""
