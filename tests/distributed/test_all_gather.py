"""FP8 all-gather under FSDP2, on two real processes: the same numbers as a gather in bf16, in half the bytes."""

import pytest
import torch
import torch.distributed as dist
from ranks import spawn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fp8 import FP8Linear, convert_linears, fp8_autocast
from lightning_fp8.compute import end_step, restore_linears
from lightning_fp8.compute.gathered import GatheredWeight
from lightning_fp8.distributed import gather_in_fp8
from lightning_fp8.numerics import E4M3, dequantize, quantize
from lightning_fp8.optim import FP8AdamW

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
        if name.startswith("c10d::_allgather_base"):  # FSDP2's; those of full_tensor() have another name
            self.gathered += args[1].nbytes
        self.reductions += name.startswith("c10d::allreduce")
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.up, self.down = nn.Linear(64, 96, dtype=dtype), nn.Linear(96, 64, bias=False, dtype=dtype)
        self.norm = nn.LayerNorm(64, dtype=dtype)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def build(mesh, recipe="tensorwise", fp8=True, dtype=torch.bfloat16, policy=None, layers=False):
    torch.manual_seed(3)
    model = nn.Sequential(Block(dtype), Block(dtype), nn.Linear(64, 32, dtype=dtype))
    options = {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy()}
    if layers:  # which Fabric does, and the Trainer afterwards
        convert_linears(model, recipe)
    for block in model[: 3 if layers else 2]:
        fully_shard(block, **options)
    fully_shard(model, **options)
    report = convert_linears(model, recipe)
    assert len(report.converted) == 5
    if fp8:
        names = gather_in_fp8(model)
        assert names == gather_in_fp8(model) == report.converted  # idempotent
    return model


def batch(step):
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return torch.randn(16, 64, generator=generator).bfloat16()


def micro_batch(model, number):
    return model(batch(number)).float().square().mean()


def train(model, optimizer, steps=3, accumulate=1):
    """Losses and, of the last step, gradients."""
    seen = []
    for step in range(steps):
        for part in range(accumulate):
            loss = micro_batch(model, accumulate * step + part)
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


def whole(p):
    return p.full_tensor() if isinstance(p, DTensor) else p


def on_a_rank(folder):
    mesh = DeviceMesh("cpu", [0, 1, 2])
    copies = DeviceMesh("cpu", [[0], [1], [2]], mesh_dim_names=("copies", "shards"))
    numerics_are_those_of_a_bf16_gather(mesh)  # 64, 96 and 32 rows: the last process has fewer
    numerics_are_those_of_a_bf16_gather(copies, ["tensorwise"])
    fp32_weights_are_gathered_as_bf16_would_be(mesh)
    half_the_bytes_and_one_reduction(mesh)
    others_see_the_plain_weight(mesh)
    weights_that_were_written_are_measured_again(mesh)
    nothing_is_hidden(mesh)
    a_layer_that_was_switched_off_takes_the_decoded_weight(mesh)
    recipes_that_need_more_are_refused(mesh)
    cached_casts_end_with_the_step(mesh)


def numerics_are_those_of_a_bf16_gather(mesh, recipes=RECIPES):
    for name in recipes:
        recipe = RECIPES[name]
        for layers in (False, True):
            plain, fp8 = build(mesh, recipe, fp8=False, layers=layers), build(mesh, recipe, layers=layers)
            expected, actual = train(plain, optimizer_of(plain)), train(fp8, optimizer_of(fp8))
            assert_same(actual[0], expected[0])
            assert_same(actual[1], expected[1])
            assert_same(*([whole(p) for p in m.state_dict().values()] for m in (plain, fp8)))
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
        micro_batch(model, 0).backward()
        with Wire() as wire:
            for _ in range(2):
                for part in range(3):
                    micro_batch(model, part).backward()
                optimizer.step()
                end_step(model)
        counts[fp8] = wire.gathered, wire.reductions
    # What a process sends: its part, with as many rows as the largest has.
    rows = {name: p.shape[1:].numel() * -(-p.shape[0] // 3) for name, p in model.named_parameters()}
    weights = sum(n for name, n in rows.items() if name.endswith("weight") and "norm" not in name)
    others = sum(rows.values()) - weights
    gathers = 2 * 3 * 2  # for forward and for backward
    assert counts[False] == (gathers * 2 * (weights + others), 0)
    assert counts[True] == (gathers * (weights + 2 * others), 1)  # after a step, and not at each micro-batch
    assert others < 0.03 * weights


def output(model, step=7):
    with torch.no_grad():
        return model(batch(step)).float()


def others_see_the_plain_weight(mesh):
    model = build(mesh)
    optimizer = optimizer_of(model)
    train(model, optimizer, 1)
    state = model.state_dict()
    assert state.keys() == build(mesh, fp8=False).state_dict().keys()
    assert all(type(p.to_local()) is torch.Tensor and p.dtype is torch.bfloat16 for p in state.values())
    moments = [value for of_p in optimizer.state.values() for value in of_p.values()]
    assert all(type(value.to_local()) is torch.Tensor for value in moments if isinstance(value, DTensor))
    assert all(type(part) is nn.Parameter or isinstance(part, DTensor) for part in model.parameters())


def weights_that_were_written_are_measured_again(mesh):
    plain, fp8 = build(mesh, fp8=False), build(mesh)
    assert_same([output(fp8)], [output(plain)])
    tripled = {name: 3 * p for name, p in plain.state_dict().items()}
    changes = (
        lambda model: model.load_state_dict(tripled),
        lambda model: model.load_state_dict({name: 2 * p for name, p in tripled.items()}, assign=True),
        lambda model: model.to("cpu"),
        lambda model: model[0].up.weight.mul_(5),
    )
    for change in changes:
        for model in (plain, fp8):
            with torch.no_grad():
                change(model)
        assert_same([output(fp8)], [output(plain)])
    with Wire() as wire:
        output(fp8)
    assert wire.reductions == 0  # nothing changed
    assert wire.gathered < sum(p.numel() for p in fp8.parameters())  # it was in FP8 all the time


def nothing_is_hidden(mesh):
    model = build(mesh)
    with torch.no_grad():
        if dist.get_rank() == 0:
            model[1].up.weight.to_local()[0, 0] = torch.nan
        assert output(model).isnan().all()


def a_layer_that_was_switched_off_takes_the_decoded_weight(mesh):
    for switch_off in (lambda model: None, restore_linears):
        model = build(mesh)
        layer = model[2]
        with torch.no_grad():
            weight = layer.weight.full_tensor()
            layer.bias.to_local().zero_()
        decoded = dequantize(quantize(weight, E4M3), torch.bfloat16)
        x = batch(0).requires_grad_()
        output(model)
        switch_off(model)
        seen = []
        hook = layer.register_forward_hook(
            lambda layer, inputs, y, seen=seen: seen.append((inputs[0], layer.weight, y))
        )
        with fp8_autocast(enabled=False):
            model(x).float().sum().backward()
        hook.remove()
        ((inputs, used, y),) = seen
        assert isinstance(used, GatheredWeight)
        assert torch.equal(y, inputs @ decoded.t())
        expected = torch.ones_like(y).t() @ inputs
        reduced, size = expected.detach().double(), expected.detach().double().abs()
        for each in (reduced, size):
            dist.all_reduce(each, group=mesh.get_group())
        # bf16 rounds each rank's product, two sums of three ranks and their mean, each to 2^-9 of what is added up.
        error = (layer.weight.grad.full_tensor().double() - reduced / 3).abs()
        assert (error <= 5 * 2**-9 * size / 3).all()


def recipes_that_need_more_are_refused(mesh):
    for recipe, reason in (
        ("rowwise", "0.up cannot be gathered in FP8: it is scaled by row"),
        ({"high_precision": ["input_grad"]}, "the input_grad GEMM takes it in high precision"),
    ):
        with pytest.raises(ValueError, match=reason):
            build(mesh, recipe)
    unsharded = nn.Linear(32, 32)
    convert_linears(unsharded)
    assert gather_in_fp8(unsharded) == []


def cached_casts_end_with_the_step(mesh):
    plain, cached = build(mesh, fp8=False), build(mesh, fp8=False)
    convert_linears(cached, cache_weights=True)
    expected, actual = (train(m, optimizer_of(m), accumulate=2) for m in (plain, cached))
    assert_same(actual[0] + actual[1], expected[0] + expected[1])


def test_what_is_gathered_in_fp8(tmp_path):
    spawn(on_a_rank, 3, tmp_path)
