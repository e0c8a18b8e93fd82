import torch
from torch import nn

from lightning_fp8.optim import FP8AdamW, decay_groups


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 64)
        self.norm = nn.LayerNorm(64)
        self.proj = nn.Linear(64, 64)
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.head = nn.Linear(64, 8, bias=False)
        self.head.weight = self.embedding.weight


def names(group):
    return [name for name, _ in group["params"]]


def test_matrices_decay_and_vectors_do_not():
    matrices, vectors = decay_groups(Tied())
    assert names(matrices) == ["embedding.weight", "proj.weight"]  # the tied weight once, nothing frozen
    assert names(vectors) == ["norm.weight", "norm.bias", "proj.bias"]
    assert "weight_decay" not in matrices
    assert vectors["weight_decay"] == 0.0


def test_an_empty_group_is_left_out():
    assert [names(group) for group in decay_groups(nn.Linear(4, 4, bias=False))] == [["weight"]]
    assert [names(group) for group in decay_groups(nn.LayerNorm(4))] == [["weight", "bias"]]


def test_the_optimizer_takes_names_and_decay():
    module = Tied()
    optimizer = FP8AdamW(decay_groups(module), lr=0.1, weight_decay=0.5)
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["embedding.weight", "proj.weight"],
        ["norm.weight", "norm.bias", "proj.bias"],
    ]
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # with zero gradients only the decay acts
    for name, p in module.named_parameters():
        decay = 1 - 0.1 * 0.5 if p.dim() == 2 and p.requires_grad else 1.0
        assert torch.equal(p, before[name] * decay), name
