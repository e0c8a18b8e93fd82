"""Smooth-SwiGLU: a linear layer that takes half of its input's outliers into its weight, the same function.

Training aligns a few neurons' gate and up weights; such a neuron is quadratic in its input, and now and then a
thousand times larger than its neighbours (Fishman et al., "Scaling FP8 training to trillion-token LLMs", 2409.12517).
In FP8 with a scale a tensor it flushes those to zero. So each channel f of the product h is divided by a factor s_f,
and the column of the weight that it meets is multiplied by it:

    y_d = sum_f (h_f / s_f) (w_df s_f),    s_f = 2^ceil(log2(amax_f) / 2),    amax_f = max of |h_f| over the tokens

Factors are powers of two, so fp32 and bf16 results do not change by a bit, short of their subnormal numbers. They come
from the batch itself and cancel: nothing is learnt, kept or exported, and the state dict is the plain model's.

The paper has s_f = amax_f. That moves all of the outlier into one column of the weight, which then does to the weight
what it did to the input. Its root leaves each with half of the octaves, as SmoothQuant's strength of 1/2 does (Xiao et
al., 2211.10438). One neuron of 384 with gate = up = 30 u, |u| = 1, the other weights drawn with 0.02, through
`FP8Linear` with scales a tensor; relative errors against fp32, of y the median over tokens, of the gradients over
channels (`tests/models/test_smooth.py`); 0.04 to 0.06 are the formats' own:

| s_f          | h flushed | w s flushed | y    | dh   | dw   |
|--------------|-----------|-------------|------|------|------|
| 1            | 69 %      | 0 %         | 0.27 | 0.06 | 0.36 |
| amax_f       | 0 %       | 40 %        | 0.24 | 0.27 | 0.06 |
| sqrt(amax_f) | 1 %       | 0 %         | 0.04 | 0.06 | 0.06 |

Costs two passes over h and one over the weight, and autograd keeps the scaled weight until backward.

Suffixes of tensor names:  t tokens, d width of the output, f width of the input.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

_OCTAVES = 40  # a factor lies within 2^-40 and 2^40: far from where it could take a weight out of bf16's range


def smoothed(linear: nn.Linear, h_tf: Tensor) -> Tensor:
    """`linear(h_tf)`, computed as said above by whatever `linear` is: its own forward gets both scaled operands."""
    factors_f = factors(h_tf.detach())
    scaled = {"weight": linear.weight * factors_f.to(linear.weight.dtype)}
    y: Tensor = functional_call(linear, scaled, (h_tf / factors_f.to(h_tf.dtype),))
    return y


def factors(h_tf: Tensor) -> Tensor:
    """The factors [F], fp32 powers of two; 1 for a channel that is 0 or not finite.

    Args:
        h_tf: [..., F], outside autograd.
    """
    amax_f = h_tf.flatten(0, -2).abs().amax(0).float()
    octaves_f = (amax_f.log2() / 2).ceil().clamp(-_OCTAVES, _OCTAVES)
    return torch.where((amax_f > 0) & amax_f.isfinite(), octaves_f.exp2(), 1.0)
