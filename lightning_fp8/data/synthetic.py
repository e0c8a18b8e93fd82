"""Seeded sources of tokens without files, whose best possible loss is known: tasks for experiments on stability.

A toy that is too easy hides what it is to show. Each of these three shows something:

    skip_bigram   x[t+1] depends on x[t-1] alone, so attention must carry it. A model whose blocks are dead, as under
                  gradients that underflow, learns no more than the frequencies of tokens. A task that a table of
                  bigrams solves cannot tell the two apart.
    zipf          512 tokens of which most are rare, so that the second moments of their rows span many octaves: what
                  a format of moments with too little range does not survive.
    markov_copy   bigrams, and now and then the token of 16 positions ago: a bit of both, quickly learnt

The next token's distribution is known, so the loss of a perfect model is too: on average (`entropy`) and on given
tokens (`best_loss`), against which a model's loss on the same tokens has no sampling noise in common parts.

    p(x[t+1] | x[..t]) = (1 - copy) transition[x[t+1-lag]] + copy [x[t+1] = x[t+1-copy_lag]]

Where there is no token yet that a term looks at, the token comes from the stationary distribution, or without copies.

Everything is computed in fp64 on the CPU, and a batch is a function of (seed, step, size) alone, so that runs can be
paired, resumed and skipped ahead. Random numbers are torch's, which may differ between its releases.

Suffixes of tensor names:  b batch, t position, v vocabulary, w vocabulary of the next token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True, eq=False)
class TokenSource:
    """A stationary source of tokens; see the formula above.

    Attributes:
        transition_vw: fp64 [V, V], rows of probabilities.
        lag: How many positions before the next token the one stands that it depends on.
        copy: Probability of a copy.
        copy_lag: How many positions before it the token stands that is copied.
    """

    transition_vw: Tensor
    lag: int = 1
    copy: float = 0.0
    copy_lag: int = 16

    def __post_init__(self) -> None:
        sums = self.transition_vw.sum(1)
        if not torch.allclose(sums, torch.ones_like(sums)) or bool((self.transition_vw < 0).any()):
            raise ValueError("TokenSource: transition_vw needs rows of probabilities that sum to 1.")
        if self.lag < 1 or self.copy_lag < 1 or not 0 <= self.copy < 1:
            raise ValueError(
                f"TokenSource: lag {self.lag} and copy_lag {self.copy_lag} must be 1 or more, and copy {self.copy} in"
                " [0, 1)."
            )

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.transition_vw)

    def stationary(self) -> Tensor:
        """How often each token occurs, fp64 [V]; copies change nothing about it."""
        v = self.vocab_size
        equations = torch.cat([self.transition_vw.T - torch.eye(v, dtype=torch.float64), torch.ones(1, v)])
        one = torch.zeros(v + 1, 1, dtype=torch.float64)
        one[-1] = 1.0
        solution: Tensor = torch.linalg.lstsq(equations, one).solution[:, 0]
        return solution.clamp_min(0)

    def entropy(self) -> float:
        """The loss of a perfect model, nats a token, once it sees `lag` tokens.

        Raises:
            ValueError: There are copies, and then no closed form: see `best_loss`.
        """
        if self.copy:
            raise ValueError("TokenSource.entropy: with copies there is no closed form; use best_loss(tokens).")
        return float(self.stationary() @ torch.special.entr(self.transition_vw).sum(1))

    def batch(self, step: int, size: int, length: int, *, seed: int = 0) -> Tensor:
        """Batch number `step`: int64 [`size`, `length`].

        Args:
            step: Counted from 0.
            size: Sequences.
            length: Of each; T + 1 for T predictions.
            seed: Of the order of batches, not of the source.
        """
        # CPU generators look at 32 bits of a seed; an odd multiple keeps the steps of different seeds apart.
        generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + step) % 2**32)
        draws_tb = torch.rand(length, size, 2, generator=generator, dtype=torch.float64)
        cumulative_vw, first_w = self.transition_vw.cumsum(1), self.stationary().cumsum(0)
        tokens_tb = torch.empty(length, size, dtype=torch.int64)
        for t in range(length):
            rows_bw = cumulative_vw[tokens_tb[t - self.lag]] if t >= self.lag else first_w.expand(size, -1)
            drawn_b = torch.searchsorted(rows_bw.contiguous(), draws_tb[t, :, :1].contiguous()).clamp_max(
                self.vocab_size - 1
            )[:, 0]
            copied_b = (draws_tb[t, :, 1] < self.copy) & (t >= self.copy_lag)
            tokens_tb[t] = (
                torch.where(copied_b, tokens_tb[t - self.copy_lag], drawn_b) if t >= self.copy_lag else drawn_b
            )
        return tokens_tb.T.contiguous()

    def best_loss(self, tokens_bt: Tensor) -> float:
        """The mean loss, nats, of a perfect model that predicts each token but the first of `tokens_bt` [B, T]."""
        targets_bt = tokens_bt[:, 1:]
        stationary_w = self.stationary()
        likelihood_bt = stationary_w[targets_bt]
        known = slice(self.lag - 1, None)
        likelihood_bt[:, known] = self.transition_vw[tokens_bt[:, : -self.lag], targets_bt[:, known]]
        copies = slice(self.copy_lag - 1, None)
        same_bt = tokens_bt[:, : -self.copy_lag] == targets_bt[:, copies]
        likelihood_bt[:, copies] = (1 - self.copy) * likelihood_bt[:, copies] + self.copy * same_bt
        return float(-likelihood_bt.log().mean())


def skip_bigram(vocab_size: int = 32, *, sharpness: float = 4.0, seed: int = 0) -> TokenSource:
    """Two interleaved Markov chains, x[t-1] -> x[t+1]; rows of a softmax of normal numbers times `sharpness`.

    The defaults have an entropy of 1.24 nats; what a table of bigrams can reach is 3.13, and ln 32 is 3.47.
    """
    generator = torch.Generator().manual_seed(seed)
    logits_vw = sharpness * torch.randn(vocab_size, vocab_size, generator=generator, dtype=torch.float64)
    return TokenSource(logits_vw.softmax(1), lag=2)


def zipf(vocab_size: int = 512, *, successors: int = 4, share: float = 0.8, seed: int = 0) -> TokenSource:
    """A Markov chain of Zipf-distributed tokens: frequency about 1 / rank.

    Each token has `successors`, drawn from that distribution too, which follow it in `share` of the cases; else any
    token does.
    """
    generator = torch.Generator().manual_seed(seed)
    frequency_w = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    frequency_w /= frequency_w.sum()
    following_vs = torch.multinomial(
        frequency_w.expand(vocab_size, -1), successors, replacement=True, generator=generator
    )
    chosen_vw = torch.zeros(vocab_size, vocab_size, dtype=torch.float64)
    chosen_vw.scatter_add_(1, following_vs, torch.full(following_vs.shape, 1 / successors, dtype=torch.float64))
    return TokenSource(share * chosen_vw + (1 - share) * frequency_w)


def markov_copy(vocab_size: int = 32, *, sharpness: float = 2.0, copy: float = 0.5, seed: int = 0) -> TokenSource:
    """A Markov chain, x[t] -> x[t+1], that with probability `copy` repeats the token of 16 positions before."""
    return TokenSource(skip_bigram(vocab_size, sharpness=sharpness, seed=seed).transition_vw, copy=copy)


@dataclass(frozen=True)
class SyntheticBatches(Dataset[Tensor]):
    """The batches of a source, [`size`, `length`] each, for `DataLoader(…, batch_size=None)`.

    Attributes:
        source: Where tokens come from.
        steps: How many batches there are.
        size: Sequences in a batch.
        length: Of a sequence; T + 1 for T predictions.
        seed: Of their order; the first `steps` batches of two datasets with one seed are the same.
    """

    source: TokenSource
    steps: int
    size: int
    length: int
    seed: int = 0

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Tensor:
        if not 0 <= step < self.steps:
            raise IndexError(step)
        return self.source.batch(step, self.size, self.length, seed=self.seed)
