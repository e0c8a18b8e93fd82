"""RMSNorm for activations and gains of different dtypes."""

from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose gain follows the dtype of its input.

    Under autocast activations are bf16 and gains fp32; torch then warns and leaves its fused kernel unused.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns x / rms(x) * gain, over the last dimension."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
