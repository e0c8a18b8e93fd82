"""A source of tokens whose next one depends on the last two together, so that the MLPs are needed.

    p(x[t+1] | x[..t]) = table[x[t-1], x[t]]

Attention adds up what it finds at both places, and logits that are a sum of one term for each cannot be a table that is
no such sum. With the MLPs taken out the decoder of these tests ends at 2.12 nats instead of 1.61 (150 steps, seed 0).
On `skip_bigram`, where a table of one token is enough, it ends where it does with them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fp8.data.synthetic import TokenSource


@dataclass(frozen=True, eq=False)
class Pairs(TokenSource):
    """Such a source; its first two tokens are drawn from `transition_vw`, rows that are all the same.

    Attributes:
        table_uvw: fp64 [V, V, V], rows of probabilities.
    """

    table_uvw: Tensor | None = None

    def batch(self, step: int, size: int, length: int, *, seed: int = 0) -> Tensor:
        """Batch number `step`, as that of any source."""
        assert self.table_uvw is not None
        tokens_bt = super().batch(step, size, 2, seed=seed)
        generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + step) % 2**32)
        cumulative_uvw = self.table_uvw.cumsum(-1)
        for draws_b in torch.rand(length - 2, size, generator=generator, dtype=torch.float64):
            rows_bw = cumulative_uvw[tokens_bt[:, -2], tokens_bt[:, -1]]
            drawn_b1 = torch.searchsorted(rows_bw, draws_b[:, None]).clamp_max(self.vocab_size - 1)
            tokens_bt = torch.cat([tokens_bt, drawn_b1], 1)
        return tokens_bt


def pairs(vocab_size: int = 16, *, sharpness: float = 3.0, seed: int = 0) -> Pairs:
    """A table of softmaxes of normal numbers times `sharpness`."""
    v, generator = vocab_size, torch.Generator().manual_seed(seed)
    logits_uvw = sharpness * torch.randn(v, v, v, generator=generator, dtype=torch.float64)
    return Pairs(torch.full((v, v), 1 / v, dtype=torch.float64), table_uvw=logits_uvw.softmax(-1))
