"""One module per backend: what it needs, and the problems that its kernels cover."""
