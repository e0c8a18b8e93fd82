"""What FP8 hardware accepts, checked on every device: a run on a laptop refuses what a GPU would refuse.

Two checks. `check_product` is about the operands as the layers give them, and every backend is behind it. What it asks
cannot be mended by a backend: sizes, formats and which scales go together. `check_layout` is about the tensors handed
to `torch.nn.functional.scaled_mm`: order of memory, padding and the layout of scales. torch's own checks are no
substitute: on CPUs and in fake-tensor mode they let pass much of what a device refuses.

Source of the rules: cuBLASLt's documentation of FP8 matmuls, and the checks in torch's `ScaledBlas.cpp`.
"""

import torch
from torch import Tensor

from lightning_fp8.numerics import Quantized

SIZE_MULTIPLE = 16  # of the inner dimension and of the columns of the result: 16 bytes, cuBLASLt's alignment
SWIZZLE_ROWS, SWIZZLE_COLUMNS = 128, 4  # MX scales come in tiles of so many
BLOCK_SCALE_ROWS = 4  # scales of 1x128 blocks are read 16 bytes at a time

_FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2)
# (tile of a, tile of b) as each lies in the product a [M, K] . b [K, N]; scales run along K.
_TILE_PAIRS = {
    (None, None): "tensor or row",
    ((1, 128), (128, 1)): "1x128 . 1x128",
    ((1, 128), (128, 128)): "1x128 . 128x128",
    ((1, 32), (32, 1)): "MX 1x32 . 1x32",
}


def check_product(a: Quantized, b: Quantized) -> None:
    """Checks that hardware multiplies a [M, K] and b [K, N].

    Raises:
        ValueError: It does not; says which operand, what it is and what it may be.
    """
    if a.codes.dim() != 2 or b.codes.dim() != 2 or a.codes.shape[1] != b.codes.shape[0]:
        raise _refusal(f"sizes {tuple(a.codes.shape)} and {tuple(b.codes.shape)} do not fit; K must be the same")
    if b.codes.shape[1] % SIZE_MULTIPLE:
        raise _refusal(f"N is {b.codes.shape[1]}; it must be a multiple of {SIZE_MULTIPLE}")
    for name, operand in (("a", a), ("b", b)):
        if operand.codes.dtype not in _FORMATS:
            raise _refusal(f"{name} is {operand.codes.dtype}; it must be one of {', '.join(map(str, _FORMATS))}")
    if a.codes.dtype is b.codes.dtype is torch.float8_e5m2:
        raise _refusal("both operands are e5m2; one of them must be e4m3")
    if (a.tile, b.tile) not in _TILE_PAIRS:
        pairs = ", ".join(_TILE_PAIRS.values())
        raise _refusal(f"scales by tiles {a.tile} and {b.tile} do not go together; what does: {pairs}")
    (m, k), n = a.codes.shape, b.codes.shape[1]
    for name, operand, rows, columns, lines in (("a", a, m, k, (m, 1)), ("b", b, k, n, (1, n))):
        shape = tuple(operand.scale.shape)
        tiled = operand.tile and (-(-rows // operand.tile[0]), -(-columns // operand.tile[1]))
        allowed = [tiled] if tiled else [(), lines]
        if operand.scale.dtype is not torch.float32 or shape not in allowed:
            raise _refusal(f"scales of {name} are {operand.scale.dtype} {shape}; they must be fp32 {allowed}")
    if (a.tile is None) and (a.scale.dim() == 0) != (b.scale.dim() == 0):
        raise _refusal("one operand has a scale a tensor, the other one a line; both must have the same")


def check_layout(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, kind: str) -> None:
    """Checks the arguments of `scaled_mm` itself.

    Args:
        a: float8 codes [M, K].
        b: float8 codes [K, N].
        scale_a: Scales of a, arranged for `scaled_mm`.
        scale_b: Scales of b, likewise.
        kind: "tensor", "row", "block_1x128", "block_128x128" (of b; a is then by 1x128) or "mx_1x32".

    Raises:
        ValueError: A device would refuse them, or read them wrongly.
    """
    (m, k), n = a.shape, b.shape[1]
    if a.stride() != (k, 1):
        raise _refusal(f"a must be row-major, its strides are {a.stride()}")
    if b.stride() != (1, k):
        raise _refusal(f"b must be column-major, its strides are {b.stride()}")
    if k % SIZE_MULTIPLE or n % SIZE_MULTIPLE:
        raise _refusal(f"K is {k} and N is {n}; both must be multiples of {SIZE_MULTIPLE}")
    blocks = -(-k // 128)
    padded = _round_up(blocks, 4)
    swizzled = _round_up(-(-k // 32), SWIZZLE_COLUMNS)
    shapes = {
        "tensor": ((), ()),
        "row": ((m, 1), (1, n)),
        "block_1x128": ((m, blocks), (n, blocks)),
        "block_128x128": ((m, blocks), (padded, -(-n // 128))),
        "mx_1x32": ((_round_up(m, SWIZZLE_ROWS) * swizzled,), (_round_up(n, SWIZZLE_ROWS) * swizzled,)),
    }[kind]
    dtype = torch.float8_e8m0fnu if kind == "mx_1x32" else torch.float32
    for name, scale, shape in (("a", scale_a, shapes[0]), ("b", scale_b, shapes[1])):
        if tuple(scale.shape) != shape or scale.dtype is not dtype:
            raise _refusal(f"scales of {name} are {scale.dtype} {tuple(scale.shape)}; they must be {dtype} {shape}")
        column_major = kind.startswith("block")
        if column_major and scale.stride() != (1, shape[0]):
            raise _refusal(f"scales of {name} must be column-major, their strides are {scale.stride()}")
        if not column_major and not (scale.is_contiguous() and scale.stride()[-1:] in ((), (1,))):
            raise _refusal(f"scales of {name} must be contiguous, their strides are {scale.stride()}")
    if kind.startswith("block") and m % BLOCK_SCALE_ROWS:
        raise _refusal(f"M is {m}; with scales by 1x128 it must be a multiple of {BLOCK_SCALE_ROWS}")


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _refusal(what: str) -> ValueError:
    return ValueError(f"FP8 GEMM: {what}.")
