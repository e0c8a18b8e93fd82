"""Small parameters with gradients that follow from the step, trained by `FP8AdamW`."""

import torch

from lightning_fp8.optim import FP8AdamW

SHAPES = {"a.weight": (24, 256), "b.weight": (16, 200), "conv.weight": (4, 16, 3, 3), "norm": (96,), "gate": (5, 8)}


QUANTIZED = ["a.weight", "b.weight", "conv.weight"]


def parameters(dtype=torch.bfloat16, seed=0, shapes=SHAPES):
    gen = torch.Generator().manual_seed(seed)
    return {name: torch.nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for name, s in shapes.items()}


def set_grads(params, step, size=1.0):
    """Gradients that depend on the step and the name only."""
    for name, p in params.items():
        gen = torch.Generator().manual_seed(1000 * step + len(name))
        p.grad = (torch.randn(p.shape, generator=gen) * size).to(p.dtype)


def poison(params, value, name="b.weight"):
    params[name].grad.view(-1)[-1] = value


def train(optimizer, params, steps, size=1.0):
    for step in steps:
        set_grads(params, step, size)
        optimizer.step()


def same_bits(a, b):
    return a.dtype is b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_same(params, optimizer, others, other):
    """Weights and state are equal, bit for bit."""
    for name, p in params.items():
        q = others[name]
        assert same_bits(p.data, q.data), name
        state, other_state = optimizer.state[p], other.state[q]
        assert state.keys() == other_state.keys()
        for key, value in state.items():
            assert same_bits(value.reshape(-1), other_state[key].reshape(-1)), (name, key)


def bits_of(params, optimizer):
    tensors = {name: p.detach() for name, p in params.items()}
    tensors |= {f"{name}.{key}": value for name, p in params.items() for key, value in optimizer.state[p].items()}
    return {name: tensor.reshape(-1).view(torch.uint8).clone() for name, tensor in tensors.items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def trained(steps=3, *, dtype=torch.bfloat16, size=1.0, pack=lambda params: list(params.items()), **options):
    """After so many steps, or these."""
    params = parameters(dtype)
    optimizer = FP8AdamW(pack(params), **{"lr": 0.01, **options})
    train(optimizer, params, range(steps) if isinstance(steps, int) else steps, size)
    return params, optimizer
