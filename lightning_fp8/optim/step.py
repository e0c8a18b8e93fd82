"""The arithmetic of one AdamW step on blocks, whatever the format of weights and moments.

A function from what was stored to what is to be stored. It knows neither parameters nor state dicts nor names: those
are `packing.py`'s and `adamw.py`'s.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_fp8.numerics import elementary
from lightning_fp8.numerics.moments import FP8Moments
from lightning_fp8.numerics.moments_absmax import AbsmaxE5M2Moments, AbsmaxMoments
from lightning_fp8.numerics.moments_coat import CoatMoments
from lightning_fp8.numerics.moments_fp8lm import FP8LMMoments
from lightning_fp8.numerics.moments_plain import BF16Moments, FP32Moments
from lightning_fp8.numerics.weights import Weights

Moments = FP8Moments | AbsmaxMoments | AbsmaxE5M2Moments | CoatMoments | FP8LMMoments | BF16Moments | FP32Moments
MOMENTS: dict[str, type[Moments]] = {
    "fp8": FP8Moments,
    "e4m3": AbsmaxMoments,
    "e4m3/e5m2": AbsmaxE5M2Moments,
    "coat": CoatMoments,
    "fp8_lm": FP8LMMoments,
    "bf16": BF16Moments,
    "fp32": FP32Moments,
}


class Hyper(NamedTuple):
    """The numbers of one step of one group: Python's or scalar tensors; `lr` may be [n, 1] too."""

    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float | Tensor
    weight_decay: float | Tensor
    maximize: bool = False
    max_update: float | None = None

    @classmethod
    def of(cls, group: dict[str, Any]) -> "Hyper":
        """Those of a parameter group."""
        numbers = {name: group[name] for name in ("lr", "eps", "weight_decay", "maximize", "max_update")}
        return cls(beta1=group["betas"][0], beta2=group["betas"][1], **numbers)

    def as_tensors(self) -> "Hyper":
        """The same in fp64 scalars, so that a compiled step does not depend on their values; the limit stays a number.

        An fp64 scalar counts in arithmetic as a Python number does, so results are the same too.
        """
        lr, beta1, beta2, eps, decay = (torch.as_tensor(number, dtype=torch.float64) for number in self[:5])
        return self._replace(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay)


class Corrections(NamedTuple):
    """What the moments are multiplied by because they start at zero: 1 / (1 - beta^t), fp32 [n, 1], of each block."""

    m: Tensor
    v: Tensor


class Step(NamedTuple):
    """What a step of n blocks has made.

    Attributes:
        weights: To store.
        moments: To store.
        exact: fp32 [n, b], the weights before they were rounded.
        update: fp32 [n, b], what the learning rate multiplies.
        v: fp32 [n, b], the second moment before it was quantised.
    """

    weights: Weights
    moments: Moments
    exact: Tensor
    update: Tensor
    v: Tensor


def step_blocks(
    weights: Weights,
    grad: Tensor,
    moments: Moments,
    bits: Tensor,
    uniform: Tensor,
    corrections: Corrections,
    hyper: Hyper,
) -> Step:
    """The step of n blocks of b elements: the formulas of `adamw.py`.

    Args:
        weights: [n, b], what was stored of them after the last step.
        grad: bf16 or fp32 [n, b].
        moments: What was stored of them after the last step.
        bits: int32 [n, b] random bits, which round the weight.
        uniform: fp32 [n, b] in [0, 1), which rounds the second moment.
        corrections: Of bias.
        hyper: Scalars.
    """
    g = -grad.float() if hyper.maximize else grad.float()
    m, v = moments.decode()
    m = m * hyper.beta1 + g * (1 - hyper.beta1)
    v = v * hyper.beta2 + g * g * (1 - hyper.beta2)
    update = (m * corrections.m) / (elementary.sqrt(v * corrections.v) + hyper.eps)
    if hyper.max_update is not None:
        update = update.clamp(-hyper.max_update, hyper.max_update)
    exact = weights.decode() * (1 - hyper.lr * hyper.weight_decay) - update * hyper.lr
    return Step(weights.encode(exact, bits), moments.encode(m, v, uniform), exact, update, v)


def squared_update_size(grad: Tensor, moments: Moments, corrections: Corrections, hyper: Hyper) -> Tensor:
    """The sum over each block, fp32 [n], of g^2 / max(v, eps^2) with the bias-corrected fresh v.

    Its mean over a tensor is the square of what StableAdamW (Wortsman et al., "Stable and low-precision training for
    large-scale vision-language models", algorithm 2) divides the learning rate by.
    """
    squared = grad.float().square()
    v = moments.decode()[1] * hyper.beta2 + squared * (1 - hyper.beta2)
    floor = max(float(hyper.eps) ** 2, torch.finfo(torch.float32).tiny)
    return (squared / (v * corrections.v).clamp_min(floor)).sum(dim=1)
