"""Gains on activations, which may be of another dtype: RMSNorm's and LayerScale's."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose gain follows the dtype of its input.

    Under autocast activations are bf16 and gains fp32; torch then warns and leaves its fused kernel unused.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns x / rms(x) * gain, over the last dimension."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LayerScale(nn.Module):
    """A learnt gain for each channel, 0 at the start, so that a block starts as the identity."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """Returns x * gain, over the last dimension."""
        return x * self.weight.to(x.dtype)
