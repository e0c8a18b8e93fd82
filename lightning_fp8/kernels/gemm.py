"""The product of two FP8 matrices that have one scale a tensor or a line, from codes to result, on a CPU.

The reference is `compute/gemm/emulated.py` in fp32, from which it differs in the order of the sum. On CPUs with dot
products of bf16 pairs (AVX512-BF16) `cpu/gemm.cpp` decodes, multiplies, scales and rounds in one go: three to five
times as fast as fp32 GEMMs there, with sums in fp32 and one rounding, where torch's bf16 GEMM would round twice.

`torch.ops.lightning_fp8.fp8_gemm` is the operator behind it, eager and compiled, so that both have the same bits.
"""

import ctypes
import functools

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightning_fp8.kernels.codes import levels
from lightning_fp8.kernels.cpu import build


def has_kernel(a: Tensor) -> bool:
    """Whether matrices that lie where `a` does are multiplied here."""
    return a.is_cpu and _runs()


def multiply(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """(a @ b) * scale_a * scale_b + bias, in `out_dtype` [M, N]; summed in fp32.

    Args:
        a: float8 codes [M, K].
        b: float8 codes [K, N].
        scale_a: fp32, a scalar or [M, 1].
        scale_b: fp32, a scalar or [1, N].
        bias: [N], any dtype.
        out_dtype: bf16, fp16 or fp32.
    """
    dtype = out_dtype if out_dtype is torch.bfloat16 else torch.float32
    product: Tensor = torch.ops.lightning_fp8.fp8_gemm(a, b, scale_a, scale_b, bias, dtype)
    return product.to(out_dtype)


# What dynamo would trace reads files and runs a compiler; the answer does not change.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _runs() -> bool:
    library = build.load("gemm")
    return library is not None and bool(library.fp8_gemm_runs())


torch.library.define(
    "lightning_fp8::fp8_gemm",
    "(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, ScalarType dtype) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.register_fake(
    "lightning_fp8::fp8_gemm",
    lambda a, b, scale_a, scale_b, bias, dtype: a.new_empty((a.shape[0], b.shape[1]), dtype=dtype),
)


@register_flop_formula(torch.ops.lightning_fp8.fp8_gemm)
def _flops(a: torch.Size, b: torch.Size, *operands: object, **options: object) -> int:
    return 2 * a[0] * a[1] * b[1]


@torch.library.impl("lightning_fp8::fp8_gemm", "cpu")
def _multiply(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    a, b = (codes if 1 in codes.stride() else codes.contiguous() for codes in (a, b))
    (m, k), n = a.shape, b.shape[1]
    scale_a, scale_b = scale_a.contiguous(), scale_b.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    y = torch.empty(m, n, dtype=dtype)
    _library().fp8_gemm(
        a.data_ptr(),
        *a.stride(),
        levels(a.dtype, torch.bfloat16).data_ptr(),
        b.data_ptr(),
        *b.stride(),
        levels(b.dtype, torch.bfloat16).data_ptr(),
        scale_a.data_ptr(),
        scale_a.numel() > 1,
        scale_b.data_ptr(),
        scale_b.numel() > 1,
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        dtype is torch.bfloat16,
        m,
        n,
        k,
        torch.get_num_threads(),
    )
    return y


@functools.cache
def _library() -> ctypes.CDLL:
    library = build.load("gemm")
    if library is None or not library.fp8_gemm_runs():
        raise ValueError("This machine has no AVX512-BF16, or no C++ compiler for it; use compute.gemm.")
    pointer, number, size = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    matrix = pointer, size, size, pointer
    library.fp8_gemm.argtypes = (
        *matrix,
        *matrix,
        *(pointer, number),
        *(pointer, number),
        pointer,
        *(pointer, number),
        *(size, size, size, number),
    )
    library.fp8_gemm.restype = None
    return library
