"""Attention within documents and sliding windows through torch's FlexAttention, on GPUs.

A mask in memory is a boolean for every pair of positions, and keeps attention from its fastest kernels. FlexAttention
compiles a rule into the kernel instead and skips every block of 128 x 128 positions that holds no pair which sees each
other: in packed sequences most of them. Torch gives it no backward on CPUs; there, and where the scores themselves are
wanted (`scores.py`), the mask stays in memory. Both give the same numbers.

Suffixes of tensor names:  b batch, h head, t position, u position that is seen.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def block_mask(
    length: int, window: int | None, documents_bt: Tensor | None, device: torch.device, *, compiled: bool = True
) -> BlockMask:
    """What `masks.causal_mask` says, as a rule.

    Args:
        length: T.
        window: A position sees itself and the `window` - 1 before it; None is all before it.
        documents_bt: The number [B, T] of the document that each token belongs to.
        device: Where attention runs.
        compiled: Find the blocks by a compiled kernel, which needs no memory for the pairs.
    """

    def sees(b: Tensor, h: Tensor, t: Tensor, u: Tensor) -> Tensor:
        seen = t >= u
        if window is not None:
            seen = seen & (t - u < window)
        if documents_bt is not None:
            seen = seen & (documents_bt[b, t] == documents_bt[b, u])
        return seen

    batch = None if documents_bt is None else documents_bt.shape[0]
    return create_block_mask(sees, batch, None, length, length, device=str(device), _compile=compiled)


def attend(q_bhts: Tensor, k_bkus: Tensor, v_bkus: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Grouped-query attention [B, H, T, s] under `mask`; compiled where there is a kernel."""
    kernel = _compiled() if q_bhts.is_cuda else flex_attention
    y_bhts: Tensor = kernel(
        q_bhts, k_bkus, v_bkus, block_mask=mask, scale=scale, enable_gqa=q_bhts.shape[1] != k_bkus.shape[1]
    )
    return y_bhts


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention)
