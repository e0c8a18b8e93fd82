"""Which positions see which: causal, within a sliding window, within a document.

A mask that is plainly causal is None, so that attention can take its causal kernel.
"""

import torch
from torch import Tensor


def causal_mask(length: int, window: int | None, documents_bt: Tensor | None, device: torch.device) -> Tensor | None:
    """Booleans, true where position t (rows) sees position u (columns): [T, T], or [B, 1, T, T] with documents.

    Args:
        length: T.
        window: A position sees itself and the `window` - 1 before it; None is all before it.
        documents_bt: The number [B, T] of the document that each token belongs to; none sees another document. Rotary
            positions know distances only, so they need not restart with each document.
        device: Of the mask.
    """
    if documents_bt is None and (window is None or window >= length):
        return None
    distance_tu = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    seen_tu = distance_tu >= 0
    if window is not None:
        seen_tu &= distance_tu < window
    if documents_bt is None:
        return seen_tu
    return (seen_tu & (documents_bt[:, :, None] == documents_bt[:, None, :]))[:, None]


def documents(tokens_bt: Tensor, end_of_text: int) -> Tensor:
    """Numbers [B, T] the documents of packed sequences; the token that ends a document belongs to it."""
    ends_bt = tokens_bt == end_of_text
    return ends_bt.cumsum(1) - ends_bt.long()
