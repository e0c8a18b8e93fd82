"""FP8 GEMMs on any device: codes -> exact values in bf16 or fp32 -> ordinary GEMMs, scaled in fp32.

Every FP8 value, hence every operand, is exact in bf16; products are exact in the fp32 accumulator. So the result
differs from a hardware FP8 GEMM only in the order of the sum and, where a bf16 GEMM rounds its output before the
scale is applied, by half a bf16 ulp: |error| <= 2^-8 |y| + the accumulation's own, on top of the cast's.

CPUs with AVX512-BF16 have a kernel for one scale a tensor or a line (`kernels/gemm.py`). It sums in fp32, too.

Scales that vary within a sum cannot be taken out of it. Powers of two (MX) are multiplied in first, exactly. Others
are too, where the GEMM is fp32; where it is bf16, there is one GEMM for each 128 terms of the sum, added up in fp32.
"""

import torch
from torch import Tensor

from lightning_fp8 import hardware
from lightning_fp8.kernels import gemm
from lightning_fp8.kernels.codes import decode
from lightning_fp8.numerics import Quantized
from lightning_fp8.numerics.quantize import dequantize

_BLOCK = 128


def emulated_gemm(
    a: Quantized, b: Quantized, bias: Tensor | None, out_dtype: torch.dtype, fast_accumulation: bool
) -> Tensor:
    """The product of a [M, K] and b [K, N], plus bias [N], as `out_dtype` [M, N]; always accumulates in fp32."""
    device = a.codes.device.type
    dtype = hardware.emulation_dtype(device)
    if a.tile is None and dtype is torch.float32 and gemm.has_kernel(a.codes):
        return gemm.multiply(a.codes, b.codes, a.scale, b.scale, bias, out_dtype)
    with torch.autocast(device, enabled=False):
        if a.tile is None:
            # Not in place: selective activation checkpointing keeps what GEMMs return.
            product = (decode(a.codes, dtype) @ decode(b.codes, dtype)).float() * (a.scale * b.scale)
        elif dtype is torch.float32 or a.tile == (1, 32):
            product = (dequantize(a, dtype) @ dequantize(b, dtype)).float()
        else:
            product = _block_by_block(a, b, dtype)
    return (product if bias is None else product + bias.float()).to(out_dtype)


def _block_by_block(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    (m, k), n = a.codes.shape, b.codes.shape[1]
    scale_b = b.scale if b.tile == (_BLOCK, 1) else b.scale.repeat_interleave(_BLOCK, 1)[:, :n]
    product = torch.zeros(m, n, device=a.codes.device)
    for block in range(0, k, _BLOCK):
        part = decode(a.codes[:, block : block + _BLOCK], dtype) @ decode(b.codes[block : block + _BLOCK], dtype)
        index = block // _BLOCK
        product.addcmul_(part.float() * a.scale[:, index : index + 1], scale_b[index])
    return product
