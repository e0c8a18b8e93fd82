"""Perplexity and bits per byte that stay finite.

torchmetrics' Perplexity takes the logarithm of a softmax in the dtype of the logits, so one confident mistake makes it
inf for the whole epoch. Here the cross-entropy is computed from fp32 logits with the log-sum-exp trick. States are fp32
and int64 whatever the default dtype is when the metric is made.
"""

import math
from typing import Any

import torch
import torchmetrics.text
from torch import Tensor
from torch.nn import functional as F

from lightning_fp8.metrics.exact import ExactStates


class Perplexity(ExactStates, torchmetrics.text.Perplexity):
    """exp of the mean cross-entropy, in nats, of the target tokens.

    `update(logits [B, T, V], targets [B, T])`; targets equal to `ignore_index` do not count. Sums over ranks.
    """

    total_log_probs: Tensor
    count: Tensor

    def __init__(self, ignore_index: int | None = None, **kwargs: Any) -> None:
        super().__init__(ignore_index, **kwargs)
        self.add_state("total_log_probs", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Adds a batch of logits [B, T, V] and targets [B, T]."""
        nll = _cross_entropy(preds, target, self.ignore_index)
        self.total_log_probs = self.total_log_probs + nll.sum()
        counted = target.numel() if self.ignore_index is None else (target != self.ignore_index).sum()
        self.count = self.count + counted


class BitsPerByte(ExactStates):
    """Cross-entropy in bits, divided by the bytes of text that the target tokens stand for.

    Unlike perplexity it compares models with different tokenizers, and with compressors. Targets that stand for no
    text, such as an end-of-text mark, count neither in the numerator nor in the denominator. Sums over ranks.

    Args:
        token_bytes: int64 [V], how many bytes each token stands for; 0 for special tokens.
    """

    full_state_update = False
    higher_is_better = False
    nll: Tensor
    bytes: Tensor
    token_bytes: Tensor

    def __init__(self, token_bytes: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("token_bytes", token_bytes, persistent=False)
        self.add_state("nll", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Adds a batch of logits [B, T, V] and targets [B, T]."""
        sizes = self.token_bytes[targets]
        nll = _cross_entropy(logits, targets, None)
        self.nll = self.nll + (nll * (sizes > 0).flatten()).sum()
        self.bytes = self.bytes + sizes.sum()

    def compute(self) -> Tensor:
        """Bits a byte; NaN before the first byte."""
        return self.nll / math.log(2) / self.bytes


def _cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int | None) -> Tensor:
    """Nats [B * T] of each target, from fp32 logits."""
    ignored = -100 if ignore_index is None else ignore_index
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none", ignore_index=ignored)
