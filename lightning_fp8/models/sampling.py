"""Drawing the next token from a decoder's logits."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Which tokens may be drawn, and how evenly; the limits apply one after the other, in the order given here.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Only so many likeliest tokens; 0 is all.
        top_p: Only the likeliest tokens that make up this probability together, the one that reaches it included.
        min_p: Only tokens at least so likely as this share of the likeliest one.
    """

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0:
            raise ValueError("generate: temperature and top_k must be 0 or more.")
        if not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError("generate: top_p must be above 0 and at most 1, min_p from 0 to 1.")


def draw(logits_bv: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token id [B] a row."""
    if sampling.temperature == 0:
        return logits_bv.argmax(-1)
    probabilities_bv = (limited(logits_bv.float() / sampling.temperature, sampling)).softmax(-1)
    return torch.multinomial(probabilities_bv, 1, generator=generator)[:, 0]


def limited(logits_bv: Tensor, sampling: Sampling) -> Tensor:
    """The logits, already divided by the temperature, with -inf for tokens that must not be drawn."""
    if 0 < sampling.top_k < logits_bv.shape[-1]:
        smallest_b1 = logits_bv.topk(sampling.top_k).values[:, -1:]
        logits_bv = logits_bv.masked_fill(logits_bv < smallest_b1, float("-inf"))
    if sampling.top_p < 1:
        sorted_bv, order_bv = logits_bv.sort(-1, descending=True)
        shares_bv = sorted_bv.softmax(-1)
        reached_bv = shares_bv.cumsum(-1) - shares_bv >= sampling.top_p  # by the likelier ones alone
        dropped_bv = torch.zeros_like(reached_bv).scatter(-1, order_bv, reached_bv)
        logits_bv = logits_bv.masked_fill(dropped_bv, float("-inf"))
    if sampling.min_p > 0:
        shares_bv = logits_bv.softmax(-1)
        too_small_bv = shares_bv < sampling.min_p * shares_bv.amax(-1, keepdim=True)
        logits_bv = logits_bv.masked_fill(too_small_bv, float("-inf"))
    return logits_bv
