"""Kernels, each with the results of a reference in plain torch operations.

Those in Triton run where their tensors are on a CUDA device that they can be compiled for; those in C++, the step of
`FP8AdamW` (`adamw.py`), the codes of an emulated GEMM (`codes.py`) and the GEMM itself (`gemm.py`), on CPUs with a
compiler. Everywhere else the references run.
"""

from lightning_fp8.kernels.cast import Cast, cast

__all__ = ["Cast", "cast"]
