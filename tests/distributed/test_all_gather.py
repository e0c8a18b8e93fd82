"""FP8 all-gather under FSDP2, on two real processes: the same numbers as a gather in bf16, in half the bytes."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import spawn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fp8 import FP8Linear, Recipe, convert_linears, fp8_autocast
from lightning_fp8.compute import end_step, restore_linears
from lightning_fp8.compute.gathered import GatheredWeight
from lightning_fp8.compute.recipe import PRESETS, Operand, resolve_recipe
from lightning_fp8.distributed import gather_in_fp8
from lightning_fp8.optim import FP8AdamW

UNEVEN = 80  # rows of 5 processes' 16 over two are even; 80 + 1 would be refused by FP8 GEMMs, so see `uneven`
RECIPES = {
    "tensorwise": {},
    "delayed": {"preset": "delayed"},
    "powers": {"weight": {"power_of_two": True, "format": "e5m2"}, "grad_output": {"format": "e4m3"}},
}


class Wire(TorchDispatchMode):
    """Counts what goes into collectives: bytes of all-gathers, and all-reduces."""

    def __init__(self):
        super().__init__()
        self.gathered, self.reductions = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if "allgather" in name:
            self.gathered += args[1].nbytes
        self.reductions += "allreduce" in name
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.up, self.down = nn.Linear(64, 96, dtype=dtype), nn.Linear(96, 64, bias=False, dtype=dtype)
        self.norm = nn.LayerNorm(64, dtype=dtype)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def build(mesh, recipe="tensorwise", fp8=True, dtype=torch.bfloat16, policy=None, layers=False, reshard=None):
    torch.manual_seed(3)
    model = nn.Sequential(Block(dtype), Block(dtype), nn.Linear(64, 32, dtype=dtype))
    before = convert_linears(model, recipe) if fp8 == "converted first" else None
    options = {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy()}
    for block in model[:2]:
        fully_shard([block.up, block.down] if layers == "group" else block, **options)
    if layers:
        fully_shard(model[2], **options)
    fully_shard(model, **options)
    report = before or convert_linears(model, recipe)
    assert len(report.converted) == 5
    if fp8:
        names = gather_in_fp8(model)
        assert names == gather_in_fp8(model) == report.converted  # idempotent
    return model


def batch(step):
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return torch.randn(16, 64, generator=generator).bfloat16()


def train(model, optimizer, steps=3, accumulate=1):
    """Losses and, of the last step, gradients."""
    seen = []
    for step in range(steps):
        for part in range(accumulate):
            loss = model(batch(accumulate * step + part)).float().square().mean()
            loss.backward()
            seen.append(loss.detach())
        gradients = [p.grad.full_tensor().clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        end_step(model)
    with torch.no_grad():
        seen.append(model(batch(99)).float())
    return seen, gradients


def optimizer_of(model):
    return FP8AdamW(model.named_parameters(), lr=1e-2)


def assert_same(a, b):
    assert len(a) == len(b)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(x, y), (i, x, y)


def on_a_rank(folder):
    mesh = init_device_mesh("cpu", (2,))
    numerics_are_those_of_a_bf16_gather(mesh)
    fp32_weights_are_gathered_as_bf16_would_be(mesh)
    half_the_bytes_and_one_reduction(mesh)


def numerics_are_those_of_a_bf16_gather(mesh):
    for name, recipe in RECIPES.items():
        for layers in (False, True):
            plain, fp8 = build(mesh, recipe, fp8=False, layers=layers), build(mesh, recipe, layers=layers)
            expected, actual = train(plain, optimizer_of(plain)), train(fp8, optimizer_of(fp8))
            assert_same(actual[0], expected[0])
            assert_same(actual[1], expected[1])
            for p, q in zip(plain.parameters(), fp8.parameters(), strict=True):
                assert torch.equal(p.full_tensor(), q.full_tensor()), name
            if name == "delayed":
                for a, b in zip(plain.modules(), fp8.modules(), strict=True):
                    if isinstance(a, FP8Linear):
                        assert torch.equal(a.fp8_scales.history, b.fp8_scales.history)


def fp32_weights_are_gathered_as_bf16_would_be(mesh):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"dtype": torch.float32, "policy": policy}
    plain, fp8 = build(mesh, fp8=False, **options), build(mesh, **options)
    expected, actual = train(plain, optimizer_of(plain)), train(fp8, optimizer_of(fp8))
    assert_same(actual[0] + actual[1], expected[0] + expected[1])


def half_the_bytes_and_one_reduction(mesh):
    counts = {}
    for fp8 in (False, True):
        model = build(mesh, fp8=fp8, layers=True)
        optimizer = optimizer_of(model)
        train(model, optimizer, 1)
        with Wire() as wire:
            train(model, optimizer, 1, accumulate=3)
        counts[fp8] = wire.gathered, wire.reductions
    elements = {name: p.numel() for name, p in model.named_parameters()}
    weights = sum(n for name, n in elements.items() if name.endswith("weight") and "norm" not in name)
    others = sum(elements.values()) - weights
    # Two blocks are gathered for forward and for backward, the last layer as well; three times, and once to evaluate.
    gathers = 2 * 3 + 1
    assert counts[False] == (gathers * 2 * (weights + others) / 2, 0)
    assert counts[True] == (gathers * (weights + 2 * others) / 2, 2)  # the weights changed before and after the step


def test_what_is_gathered_in_fp8(tmp_path):
    spawn(on_a_rank, 2, tmp_path)
