"""torch's own check of CUDA's rules, for tests on fake tensors."""

import torch


def blocks(size, block):
    return -(-size // block)


def oracle(a, b, scale_a, scale_b, kind, bias=None, dtype=torch.bfloat16):
    """The first version of the operator, which checks CUDA's rules on fake tensors too.

    It takes scales of b otherwise than the second: those of 1x128 blocks as [K blocks, N], those of 128x128 unpadded.
    """
    if kind == "block_1x128":
        scale_b = scale_b.t()
    if kind == "block_128x128":
        scale_b = scale_b[: blocks(a.shape[1], 128)]
    return torch._scaled_mm(a, b, scale_a, scale_b, bias=bias, out_dtype=dtype)
