"""What may happen to attention's scores before they weigh the values: soft-caps, clipping, a sink.

    soft-cap   scores s become c tanh(s / c) (Gemma 2)
    clip       probabilities p become clip((zeta - gamma) p + gamma, 0, 1): with gamma < 0 a head can give a token
               exactly nothing, and need not grow its scores for it (Bondarenko et al., "Quantizable Transformers")
    sink       one more logit a head in the softmax's denominator, learnt, so that a head can attend to nothing; at 0,
               where it starts, this is the softmax-off-by-one. Without it a model makes a sink of its first tokens,
               with the massive activations that this takes (Xiao et al., StreamingLLM)

The first two need the probabilities themselves, which torch's fused kernels do not show: they cost the scores
[B, H, T, U] of a layer, in fp32. The sink does not: it is one more key, with a value of zero, in whatever kernel runs.

Suffixes of tensor names:  b batch, t position, u position that is seen, h query head, k key/value head, s head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_SINK_WIDTH = 8  # channels added to heads, of which one is used: fused kernels want widths that divide by 8


class Attended(NamedTuple):
    """What attention is computed from; a mask of None is causal, query t seeing keys 0 to t."""

    q_bhts: Tensor
    k_bkus: Tensor
    v_bkus: Tensor
    mask: Tensor | None


def with_sink(x: Attended, sink_h: Tensor, scale: float) -> Attended:
    """Attention with the logit `sink_h` [H] in each softmax: a key before all others, whose value is zero.

    One more channel carries the logit: it is 1 in the new key, 0 in the others, and sink / scale in the queries. A
    causal call gets a query before all others too, so that it stays causal: the first row of its result is to be
    dropped.
    """
    q_bhts, k_bkus, v_bkus, mask = x
    batch, heads, length, _ = q_bhts.shape
    logit_h1 = F.pad((sink_h / scale).to(q_bhts.dtype)[:, None], (0, _SINK_WIDTH - 1))
    q = torch.cat([q_bhts, logit_h1[None, :, None].expand(batch, heads, length, _SINK_WIDTH)], -1)
    key = F.pad(k_bkus.new_ones(1), (k_bkus.shape[-1], _SINK_WIDTH - 1))
    k = torch.cat([key.expand(*k_bkus.shape[:2], 1, -1), F.pad(k_bkus, (0, _SINK_WIDTH))], 2)
    v = F.pad(v_bkus, (0, _SINK_WIDTH, 1, 0))
    if mask is None:
        return Attended(F.pad(q, (0, 0, 1, 0)), k, v, None)
    return Attended(q, k, v, F.pad(mask, (1, 0), value=True))


def explicit_attention(
    x: Attended, scale: float, *, softcap: float | None = None, clip: tuple[float, float] | None = None
) -> Tensor:
    """Attention with its scores in memory, fp32, soft-capped and clipped by (gamma, zeta) where that is asked for."""
    q_bhts, k_bkus, v_bkus, mask = x
    groups = q_bhts.shape[1] // k_bkus.shape[1]
    k_bhus, v_bhus = k_bkus.repeat_interleave(groups, 1), v_bkus.repeat_interleave(groups, 1)
    scores_bhtu = (q_bhts @ k_bhus.transpose(2, 3)).float() * scale
    if mask is None:
        mask = torch.ones(scores_bhtu.shape[-2:], dtype=torch.bool, device=q_bhts.device).tril()
    weights_bhtu = soft_cap(scores_bhtu, softcap).masked_fill(~mask, float("-inf")).softmax(-1)
    if clip is not None:
        gamma, zeta = clip
        weights_bhtu = ((zeta - gamma) * weights_bhtu + gamma).clamp(0, 1)
    return weights_bhtu.to(v_bhus.dtype) @ v_bhus


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """C tanh(x / c), which stays within c; `x` itself if there is no cap."""
    return x if cap is None else cap * (x / cap).tanh()
