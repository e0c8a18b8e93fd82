"""Triton kernels, each beside a reference in plain torch of the same signature.

A kernel runs where its tensors are on a CUDA device that it can be compiled for, the reference everywhere else.
"""

from lightning_fp8.kernels.cast import Cast, cast

__all__ = ["Cast", "cast"]
