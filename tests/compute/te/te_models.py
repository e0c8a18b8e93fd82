"""A model for the tests of Transformer Engine's layers, and a pass through it."""

import torch
from torch import nn

from lightning_fp8.compute import transformer_engine_autocast


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(48, 32)
        self.body = nn.Sequential(nn.RMSNorm(32, eps=1e-6), nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 32))
        self.narrow = nn.Linear(32, 10)
        self.again = nn.Linear(32, 64, bias=False)
        self.again.weight = self.body[1].weight
        self.tied = nn.Linear(32, 48, bias=False)
        self.tied.weight = self.embedding.weight
        self.lm_head = nn.Linear(32, 48)

    def forward(self, tokens):
        return self.lm_head(self.body(self.embedding(tokens)))


TOKENS = torch.arange(32).view(2, 16)


def loss(model, recipe="tensorwise", tokens=TOKENS):
    with transformer_engine_autocast(recipe):
        y = model(tokens)
    return y.float().square().mean()
