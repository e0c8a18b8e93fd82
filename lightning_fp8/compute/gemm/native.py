"""FP8 GEMMs by the hardware: `torch.nn.functional.scaled_mm`.

The layers give operands as the mathematics has them; here they get the order of memory that the hardware wants: a
row-major, b column-major, a ragged inner dimension (the tokens, in weight_grad) padded with zeros, scales in the layout
of their granularity. The kernels that cast leave codes and scales in that order already; the reference's are
transposed here, a byte an element.

Only a scale a tensor can go with an fp32 or fp16 result everywhere; the others come out in bf16.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_fp8.compute.gemm.rules import (
    BLOCK_SCALE_ROWS,
    SIZE_MULTIPLE,
    SWIZZLE_COLUMNS,
    SWIZZLE_ROWS,
    check_layout,
)
from lightning_fp8.numerics import Quantized


def native_gemm(
    a: Quantized, b: Quantized, bias: Tensor | None, out_dtype: torch.dtype, fast_accumulation: bool
) -> Tensor:
    """The product of a [M, K] and b [K, N], plus bias [N], as `out_dtype` [M, N]."""
    (m, k), n = a.codes.shape, b.codes.shape[1]
    if 0 in (m, k, n):
        empty = torch.zeros(m, n, dtype=out_dtype, device=a.codes.device)
        return empty if bias is None else empty + bias.to(out_dtype)
    kind = _kind(a, b)
    # Whole blocks of codes: zeros cost nothing but themselves, and a scale for every block is there already.
    k_padding = -k % {"mx_1x32": 32, "block_1x128": 128, "block_128x128": 128}.get(kind, SIZE_MULTIPLE)
    m_padding = -m % BLOCK_SCALE_ROWS if kind.startswith("block") else 0
    a_codes = _row_major(_padded(a.codes, m_padding, k_padding))
    b_codes = _row_major(_padded(b.codes.t(), 0, k_padding)).t()
    scale_a, scale_b = _scales(a, b, kind, m_padding)
    check_layout(a_codes, b_codes, scale_a, scale_b, kind)
    scaling_a, scaling_b, options = _arguments(kind)
    in_bf16 = kind != "tensor" or out_dtype not in (torch.float16, torch.float32)
    dtype = torch.bfloat16 if in_bf16 else out_dtype
    fused_bias = None if bias is None or dtype is torch.float32 else bias.to(dtype)
    y = F.scaled_mm(
        a_codes,
        b_codes,
        scale_a,
        scaling_a,
        scale_b,
        scaling_b,
        bias=fused_bias,
        output_dtype=dtype,
        use_fast_accum=fast_accumulation and kind in ("tensor", "row"),
        **options,
    )
    if bias is not None and fused_bias is None:
        y = y + bias.float()
    return y[:m].to(out_dtype)


def _kind(a: Quantized, b: Quantized) -> str:
    if a.tile is None:
        return "tensor" if a.scale.dim() == 0 else "row"
    if a.tile == (1, 32):
        return "mx_1x32"
    return "block_1x128" if b.tile == (128, 1) else "block_128x128"


def _arguments(kind: str) -> tuple[F.ScalingType, F.ScalingType, dict[str, Any]]:
    """How `scaled_mm` calls the scales of a and b, and what else it wants to know of them."""
    scaling = {
        "tensor": (F.ScalingType.TensorWise, F.ScalingType.TensorWise),
        "row": (F.ScalingType.RowWise, F.ScalingType.RowWise),
        "block_1x128": (F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise1x128),
        "block_128x128": (F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128),
        "mx_1x32": (F.ScalingType.BlockWise1x32, F.ScalingType.BlockWise1x32),
    }[kind]
    swizzle = F.SwizzleType.SWIZZLE_32_4_4
    return (*scaling, {"swizzle_a": swizzle, "swizzle_b": swizzle} if kind == "mx_1x32" else {})


def _scales(a: Quantized, b: Quantized, kind: str, m_padding: int) -> tuple[Tensor, Tensor]:
    """The scales of a and b in the layouts that `scaled_mm` wants."""
    if kind == "tensor":
        return a.scale, b.scale
    if kind == "row":  # lines whose strides are those of their shape, without a copy
        return a.scale.flatten().unsqueeze(1), b.scale.flatten().unsqueeze(0)
    if kind == "mx_1x32":
        return swizzle_mx_scales(a.scale), swizzle_mx_scales(b.scale.t())
    scale_a = _column_major(F.pad(a.scale, (0, 0, 0, m_padding), value=1.0) if m_padding else a.scale)
    if kind == "block_1x128":
        return scale_a, _column_major(b.scale.t())
    return scale_a, _column_major(F.pad(b.scale, (0, 0, 0, -b.scale.shape[0] % 4), value=1.0))


def swizzle_mx_scales(scale: Tensor) -> Tensor:
    """E8M0 codes of power-of-two scales [rows, K / 32] in cuBLASLt's order, flat.

    Tiles of 128 rows and 4 columns follow one another by rows; inside a tile, row r and column c lie at
    (r mod 32) * 16 + (r div 32) * 4 + c (cuBLAS documentation, "1D Block Scaling Factors Layout").
    """
    exponents = (scale.contiguous().view(torch.int32) >> 23).to(torch.uint8)  # 255, NaN, where scales are not finite
    rows, columns = scale.shape
    padded = F.pad(exponents, (0, -columns % SWIZZLE_COLUMNS, 0, -rows % SWIZZLE_ROWS))
    tiles = padded.view(padded.shape[0] // SWIZZLE_ROWS, 4, 32, padded.shape[1] // SWIZZLE_COLUMNS, SWIZZLE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(torch.float8_e8m0fnu)


def _padded(codes: Tensor, rows: int, columns: int) -> Tensor:
    if not rows and not columns:
        return codes
    return F.pad(codes.view(torch.uint8), (0, columns, 0, rows)).view(codes.dtype)


def _row_major(matrix: Tensor) -> Tensor:
    # A matrix of one row or column has strides of its own choosing; `clone` gives it those of its shape.
    return matrix if matrix.stride() == (matrix.shape[1], 1) else matrix.clone(memory_format=torch.contiguous_format)


def _column_major(scale: Tensor) -> Tensor:
    if scale.stride() == (1, scale.shape[0]):
        return scale
    transposed = scale.t()
    return torch.empty_like(transposed, memory_format=torch.contiguous_format).copy_(transposed).t()
