"""What attention looks at: the size of its logits, and how sharply it chooses."""

import torch
from torch import Tensor

from lightning_fp8.metrics.merged import Merged, total


class AttentionLogitMax(Merged):
    """max |q.k / sqrt(d)| over the pairs that see each other; -inf before the first.

    Growing logits are how a learning rate too high first shows (Wortsman et al., 2309.14322); QK-norm bounds them.
    `update(scores, seen)`, see `attention_scores`. Reduction: max.
    """

    reduction = "max"
    higher_is_better = False

    @staticmethod
    def measure(scores: Tensor, seen: Tensor | None) -> Tensor:
        """The statistic: fp64 [1]."""
        sizes = scores.abs() if seen is None else scores.abs().masked_fill(~seen, 0.0)
        return sizes.amax().double().view(1) if sizes.numel() else sizes.new_zeros(1, dtype=torch.float64)

    def update(self, scores: Tensor, seen: Tensor | None = None) -> None:
        """Adds logits [..., U] of queries over U keys, and which keys each sees (None: all); broadcast."""
        self.add(self.measure(scores, seen))


class AttentionEntropy(Merged):
    """The mean over queries of -sum p log p in nats, p being the softmax over the keys that are seen.

    log U if all U keys weigh the same, 0 if one takes all: entropy collapse (Zhai et al., 2303.06296) precedes
    divergence. Queries that see one key alone count too, as 0; those that see none do not. NaN before the first.
    `update(scores, seen)`. Reduction: sums of entropies and of queries.
    """

    size = 2
    higher_is_better = None

    @staticmethod
    def measure(scores: Tensor, seen: Tensor | None) -> Tensor:
        """The statistics: [sum of entropies, queries]."""
        x = scores.float()
        if seen is None:
            seen = torch.ones_like(x, dtype=torch.bool)
        log_p = x.masked_fill(~seen, -torch.inf).log_softmax(-1)
        entropy = -torch.where(seen, log_p.exp() * log_p.clamp_min(torch.finfo(torch.float32).min), 0.0).sum(-1)
        counted = seen.any(-1).expand_as(entropy)
        return torch.stack([total(torch.where(counted, entropy, 0.0)), total(counted)])

    @staticmethod
    def figure(statistics: Tensor) -> Tensor:
        """In nats."""
        return statistics[..., 0] / statistics[..., 1]

    def update(self, scores: Tensor, seen: Tensor | None = None) -> None:
        """Adds logits [..., U] of queries over U keys, and which keys each sees (None: all); broadcast."""
        self.add(self.measure(scores, seen))


def attention_scores(q: Tensor, k: Tensor) -> Tensor:
    """q.k / sqrt(S), fp32 [B, H, T, U], of queries [B, H, T, S] and keys [B, K, U, S]; each key head serves H / K."""
    groups = q.shape[1] // k.shape[1]
    grouped = q.float().reshape(q.shape[0], k.shape[1], groups, *q.shape[2:])
    scores: Tensor = grouped @ k.float().unsqueeze(2).transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.flatten(1, 2)
