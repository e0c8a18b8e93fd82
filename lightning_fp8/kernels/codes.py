"""FP8 codes of a tensor that has one scale, and the values of codes: the two ends of an emulated GEMM.

The references are `numerics.quantize.quantize_to` and `decode`. On CPUs, where their operations would take a third of
a small model's step, `cpu/codes.cpp` does each in one pass, with the same results; a compiled graph has the references,
which its compiler fuses.

`torch.ops.lightning_fp8.encode` and `.decode` are the operators behind it, so that fake tensors see through them.
"""

import ctypes
import functools

import torch
from torch import Tensor

from lightning_fp8.kernels.cpu import build
from lightning_fp8.numerics import FORMATS, Format
from lightning_fp8.numerics.quantize import decode as decode_by_operations
from lightning_fp8.numerics.quantize import quantize_to

_FLOATS = (torch.bfloat16, torch.float32)


def encode(x: Tensor, fmt: Format, scale: Tensor) -> Tensor:
    """The contiguous codes of `x` for a decode scale that is known: see `quantize_to`.

    Args:
        x: bf16, fp16 or fp32, any shape.
        fmt: The format of the codes.
        scale: fp32 scalar.
    """
    if x.dtype in _FLOATS and _has_kernel(x):
        codes: Tensor = torch.ops.lightning_fp8.encode(x, scale, fmt.name)
        return codes
    return quantize_to(x, fmt, scale)


def decode(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The unscaled values of float8 `codes`, exact; a transposed matrix is decoded where it lies."""
    if dtype in _FLOATS and _has_kernel(codes):
        transposed = codes.dim() == 2 and not codes.is_contiguous()
        values: Tensor = torch.ops.lightning_fp8.decode(codes.t() if transposed else codes, dtype)
        return values.t() if transposed else values
    return decode_by_operations(codes, dtype)


def _has_kernel(x: Tensor) -> bool:
    """Which of the two runs is decided here and nowhere else."""
    return not torch.compiler.is_compiling() and x.is_cpu and build.load("codes") is not None


_TAG = torch.Tag.pt2_compliant_tag
torch.library.define("lightning_fp8::encode", "(Tensor x, Tensor scale, str format) -> Tensor", tags=_TAG)
torch.library.define("lightning_fp8::decode", "(Tensor codes, ScalarType dtype) -> Tensor", tags=_TAG)


torch.library.register_fake(
    "lightning_fp8::encode", lambda x, scale, format: x.new_empty(x.shape, dtype=FORMATS[format].dtype)
)
torch.library.register_fake("lightning_fp8::decode", lambda codes, dtype: codes.new_empty(codes.shape, dtype=dtype))


@torch.library.impl("lightning_fp8::encode", "cpu")
def _encode(x: Tensor, scale: Tensor, format: str) -> Tensor:
    x, codes = x.contiguous(), torch.empty(x.shape, dtype=FORMATS[format].dtype)
    _library().fp8_encode(
        x.data_ptr(),
        x.dtype is torch.bfloat16,
        format == "e4m3",
        scale.item(),
        codes.data_ptr(),
        x.numel(),
        torch.get_num_threads(),
    )
    return codes


@torch.library.impl("lightning_fp8::decode", "cpu")
def _decode(codes: Tensor, dtype: torch.dtype) -> Tensor:
    codes, values = codes.contiguous(), torch.empty(codes.shape, dtype=dtype)
    _library().fp8_decode(
        codes.data_ptr(),
        dtype is torch.bfloat16,
        levels(codes.dtype, dtype).data_ptr(),
        values.data_ptr(),
        codes.numel(),
        torch.get_num_threads(),
    )
    return values


@functools.cache
def levels(fmt: torch.dtype, dtype: torch.dtype) -> Tensor:
    """What the 256 codes stand for: fp8 -> [256] of `dtype`."""
    return torch.arange(256, dtype=torch.uint8).view(fmt).to(dtype)


@functools.cache
def _library() -> ctypes.CDLL:
    library = build.load("codes")
    if library is None:
        raise ValueError("There is no C++ compiler for the codes' kernel; use numerics.quantize.")
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    library.fp8_encode.argtypes = pointer, number, number, ctypes.c_float, pointer, ctypes.c_int64, number
    library.fp8_decode.argtypes = pointer, number, pointer, pointer, ctypes.c_int64, number
    library.fp8_encode.restype = library.fp8_decode.restype = None
    return library
