"""What the tests of torch's own scenarios share: a few optimizers of ours, over small parameters."""

import pytest
import torch
from torch import nn, optim

from lightning_fp8.optim import FP8AdamW, FP8Optimizer

OURS = {
    "FP8AdamW": lambda params, **o: FP8AdamW(params, **{"lr": 0.01, **o}),
    "AdamW": lambda params, **o: FP8Optimizer(optim.AdamW(params, **{"lr": 0.01, **o})),
    "SGD": lambda params, **o: FP8Optimizer(optim.SGD(params, **{"lr": 0.01, "momentum": 0.9, **o})),
}


every_optimizer = pytest.mark.parametrize("make", OURS.values(), ids=OURS)


def parameters(seed=0, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(s, generator=gen, dtype=torch.float32).to(dtype)) for s in ((8, 200), (4, 64), (7,))
    ]


def set_grads(params, step=0):
    for i, p in enumerate(params):
        gen = torch.Generator().manual_seed(100 * step + i)
        p.grad = torch.randn(p.shape, generator=gen, dtype=torch.float32).to(p.dtype)


def train(optimizer, params, steps=3):
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()


def same(params, others):
    return all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


TENSOR_LR = {"lr": torch.tensor(0.001)}
