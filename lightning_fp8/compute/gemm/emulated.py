"""FP8 GEMMs on any device: codes -> exact values in bf16 or fp32 -> one ordinary GEMM, scaled in fp32.

Every FP8 value, hence every operand, is exact in bf16; products are exact in the fp32 accumulator. So the result
differs from a hardware FP8 GEMM only in the order of the sum and, where the bf16 GEMM rounds its output before the
scale is applied, by half a bf16 ulp: |error| <= 2^-9 |y| + the accumulation's own, on top of the cast's.
"""

import torch
from torch import Tensor

from lightning_fp8 import hardware
from lightning_fp8.numerics import Quantized
from lightning_fp8.numerics.quantize import decode


def emulated_gemm(a: Quantized, b: Quantized, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """The product of a [M, K] and b [K, N], plus bias [N], as `out_dtype` [M, N]."""
    device = a.codes.device.type
    dtype = hardware.emulation_dtype(device)
    with torch.autocast(device, enabled=False):
        product = decode(a.codes, dtype) @ decode(b.codes, dtype)
    product = product.float().mul_(a.scale * b.scale)
    return (product if bias is None else product.add_(bias.float())).to(out_dtype)
