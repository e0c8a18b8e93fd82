"""The product of two FP8 matrices, by a backend, with a record of what ran.

A backend is a function of two operands, a bias, the dtype of the result and whether sums may be short. "native" is the
hardware's own, "emulated" runs anywhere; "auto" is native wherever the tensors lie on a device that can do it.
`record_gemms` lets tests and reports see that FP8 was really used: it notes every FP8 GEMM that ran inside it, those
of Transformer Engine's layers as well.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_fp8 import hardware
from lightning_fp8.compute.gemm.emulated import emulated_gemm
from lightning_fp8.compute.gemm.native import native_gemm
from lightning_fp8.compute.gemm.rules import check_product
from lightning_fp8.compute.recipe import ROLES, Recipe
from lightning_fp8.numerics import Quantized

Backend = Literal["auto", "native", "emulated"]
GemmFunction = Callable[[Quantized, Quantized, Tensor | None, torch.dtype, bool], Tensor]

BACKENDS: dict[str, GemmFunction] = {"native": native_gemm, "emulated": emulated_gemm}

_log = logging.getLogger(__name__)


class GemmRecord(NamedTuple):
    """One FP8 GEMM: its sizes, the dtypes of its operands and the backend."""

    m: int
    k: int
    n: int
    a_dtype: torch.dtype
    b_dtype: torch.dtype
    backend: str

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


def recording() -> bool:
    """Whether FP8 GEMMs are to be noted here and now."""
    return bool(_records)


def note_gemm(record: GemmRecord) -> None:
    """Tells every `record_gemms` of a GEMM."""
    for records in _records:
        records.append(record)


@cache
def select_backend(backend: str, recipe: Recipe) -> str:
    """What `backend` comes to on this machine; says once what "auto" chose and why.

    Returns:
        "native", "emulated", or "auto" where native GEMMs can run: each GEMM is then native if its operands are on
        a CUDA device.

    Raises:
        ValueError: Unknown backend, or a native one that cannot run `recipe` here, with the reason and the remedy.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(
            f"FP8 backend {backend!r} is not one of auto, {', '.join(BACKENDS)}; precision plugins and"
            " convert_to_transformer_engine know transformer_engine besides."
        )
    problem = _problem(recipe)
    if backend == "native" and problem:
        raise ValueError(f"FP8 backend 'native' cannot run here: {problem}. Use 'emulated', or 'auto'.")
    if backend != "auto":
        return backend
    chosen = "emulated" if problem else "auto"
    _log.info("FP8 GEMMs are %s.", describe_backend(chosen, recipe))
    return chosen


def describe_backend(backend: str, recipe: Recipe) -> str:
    """What `select_backend` returned, in words, and why it is not native if it is not."""
    if backend == "emulated":
        problem = _problem(recipe)
        return f"emulated: {problem}" if problem else "emulated"
    return "native" if backend == "native" else "native on CUDA devices"


def _problem(recipe: Recipe) -> str | None:
    return hardware.why_not_native(tuple(sorted({recipe.operand(role).granularity for role in ROLES})))


def fp8_gemm(
    a: Quantized,
    b: Quantized,
    out_dtype: torch.dtype,
    backend: str,
    bias: Tensor | None = None,
    *,
    fast_accumulation: bool = False,
) -> Tensor:
    """The product of FP8 a [M, K] and b [K, N], plus `bias`, as `out_dtype` [M, N].

    Args:
        a: Left operand.
        b: Right operand.
        out_dtype: bf16, fp16 or fp32.
        backend: What `select_backend` returned.
        bias: [N], added before the result is rounded to `out_dtype`.
        fast_accumulation: Whether hardware may sum with fewer bits than fp32.

    Raises:
        ValueError: FP8 hardware does not multiply such operands; so says every backend, also where none is at hand.
    """
    check_product(a, b)
    if backend == "auto":
        backend = "native" if a.codes.is_cuda else "emulated"
    if recording():
        (m, k), n = a.codes.shape, b.codes.shape[1]
        note_gemm(GemmRecord(m, k, n, a.codes.dtype, b.codes.dtype, backend))
    return BACKENDS[backend](a, b, bias, out_dtype, fast_accumulation)
