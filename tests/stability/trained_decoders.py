"""Small decoders trained on synthetic tokens, one way or another, with seeds and data paired."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from lightning_fp8 import FP8Linear, Recipe, convert_linears
from lightning_fp8.data.synthetic import TokenSource
from lightning_fp8.models import Decoder, DecoderConfig
from lightning_fp8.optim import FP8AdamW

SMALL = DecoderConfig(vocab_size=32, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=2, intermediate_size=128)
DEAD_LOSS_SCALE = 1e-4


class Arm(NamedTuple):
    """A way to train: what is done to the model, the optimizer, and what the loss is multiplied by."""

    prepare: Callable[[Decoder], object]
    optimizer: Callable[[Decoder, float], Optimizer]
    loss_scale: float = 1.0


def fp32_states(model: Decoder, lr: float) -> Optimizer:
    return AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)


def end_to_end(model: Decoder, lr: float) -> Optimizer:
    return FP8AdamW(model.named_parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def without_scales(model: Decoder) -> None:
    """The dead-block control: FP8 GEMMs whose gradients are cast to E5M2 as they are.

    No recipe can say this, for all scale. It is made of delayed scaling with a scale of 1 that, as `end_step` is never
    called, stays; inputs and weights have no known scale and so take their own.
    """
    convert_linears(model, Recipe(scaling="delayed"))
    for layer in model.modules():
        if isinstance(layer, FP8Linear) and layer.fp8_scales is not None:
            layer.fp8_scales.scale[2] = 1.0


ARMS = {
    "bf16": Arm(lambda model: None, fp32_states),
    "fp8 GEMMs": Arm(convert_linears, fp32_states),
    "fp8 end to end": Arm(lambda model: (model.bfloat16(), convert_linears(model)), end_to_end),
    "dead blocks": Arm(without_scales, fp32_states, DEAD_LOSS_SCALE),
}


def train(
    arm: Arm, source: TokenSource, *, seed: int, steps: int, lr: float, config: DecoderConfig = SMALL
) -> tuple[Decoder, float]:
    """The model after `steps` of 16 sequences of 32 tokens, and its loss on 64 others, nats."""
    torch.manual_seed(seed)
    model = Decoder(replace(config, vocab_size=source.vocab_size))
    arm.prepare(model)
    optimizer = arm.optimizer(model, lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20)
        backward(model, source.batch(step, 16, 33, seed=seed), arm.loss_scale)
        optimizer.step()
        optimizer.zero_grad()
    return model, evaluate(model, source)


def backward(model: nn.Module, tokens_bt: torch.Tensor, loss_scale: float = 1.0) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=next(model.parameters()).dtype == torch.float32):
        loss = model(tokens_bt[:, :-1], tokens_bt[:, 1:])
    (loss * loss_scale).backward()


def evaluate(model: nn.Module, source: TokenSource) -> float:
    tokens_bt = source.batch(0, 64, 33, seed=10**6)
    with torch.no_grad():
        return float(model(tokens_bt[:, :-1], tokens_bt[:, 1:]))
