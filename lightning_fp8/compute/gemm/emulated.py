"""FP8 GEMMs on any device: codes -> exact values in bf16 or fp32 -> one ordinary GEMM, scaled in fp32.

Every FP8 value, hence every operand, is exact in bf16; products are exact in the fp32 accumulator. So the result
differs from a hardware FP8 GEMM only in the order of the sum and, where the bf16 GEMM rounds its output before the
scale is applied, by half a bf16 ulp: |error| <= 2^-9 |y| + the accumulation's own, on top of the cast's.

Scales that vary within a sum cannot be taken out of it: they are multiplied in first, in fp32, and the GEMM is fp32.
"""

import torch
from torch import Tensor

from lightning_fp8 import hardware
from lightning_fp8.numerics import Quantized
from lightning_fp8.numerics.quantize import decode, dequantize


def emulated_gemm(a: Quantized, b: Quantized, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """The product of a [M, K] and b [K, N], plus bias [N], as `out_dtype` [M, N]."""
    device = a.codes.device.type
    with torch.autocast(device, enabled=False):
        if a.tile is None and b.tile is None:
            dtype = hardware.emulation_dtype(device)
            product = (decode(a.codes, dtype) @ decode(b.codes, dtype)).float().mul_(a.scale * b.scale)
        else:
            product = dequantize(a) @ dequantize(b)
    return (product if bias is None else product.add_(bias.float())).to(out_dtype)
