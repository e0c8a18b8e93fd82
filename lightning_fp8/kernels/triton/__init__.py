"""The Triton kernels. Nothing imports this package when it is loaded: it needs Triton, which not every platform has."""
