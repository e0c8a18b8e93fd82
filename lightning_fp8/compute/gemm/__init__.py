"""The product of two FP8 matrices, by a backend, with a record of what ran.

A backend is a function `(a: Quantized [M, K], b: Quantized [K, N], bias [N] or None, out_dtype) -> Tensor [M, N]`.
`record_gemms` lets tests and reports see that FP8 was really used: it notes every FP8 GEMM that ran inside it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_fp8.compute.gemm.emulated import emulated_gemm
from lightning_fp8.numerics import Quantized

Backend = Literal["auto", "emulated"]
GemmFunction = Callable[[Quantized, Quantized, Tensor | None, torch.dtype], Tensor]

BACKENDS: dict[str, GemmFunction] = {"emulated": emulated_gemm}


class GemmRecord(NamedTuple):
    """One FP8 GEMM: its sizes and the dtypes of its operands."""

    m: int
    k: int
    n: int
    a_dtype: torch.dtype
    b_dtype: torch.dtype

    @property
    def flops(self) -> int:
        """Floating-point operations, a multiply-add counted as two."""
        return 2 * self.m * self.k * self.n


# A plain module variable, not a context variable: on CUDA, backward runs in a thread of the autograd engine.
_records: list[list[GemmRecord]] = []


@contextmanager
def record_gemms() -> Iterator[list[GemmRecord]]:
    """Yields a list to which every FP8 GEMM that runs inside the block, in any thread, is appended."""
    records: list[GemmRecord] = []
    _records.append(records)
    try:
        yield records
    finally:
        _records.remove(records)


def select_backend(backend: str) -> str:
    """The backend that "auto" stands for, or `backend` itself where it can run.

    Raises:
        ValueError: Unknown backend.
    """
    if backend == "auto":
        return "emulated"
    if backend not in BACKENDS:
        raise ValueError(f"FP8 backend {backend!r} is not one of auto, {', '.join(BACKENDS)}.")
    return backend


def fp8_gemm(a: Quantized, b: Quantized, out_dtype: torch.dtype, backend: str, bias: Tensor | None = None) -> Tensor:
    """The product of FP8 a [M, K] and b [K, N], plus `bias`, as `out_dtype` [M, N].

    Args:
        a: Left operand.
        b: Right operand.
        out_dtype: bf16, fp16 or fp32.
        backend: A name from `BACKENDS`.
        bias: [N], added in fp32 before the result is rounded to `out_dtype`.
    """
    for records in _records:
        records.append(GemmRecord(a.codes.shape[0], a.codes.shape[1], b.codes.shape[1], a.codes.dtype, b.codes.dtype))
    return BACKENDS[backend](a, b, bias, out_dtype)
