import copy
import dataclasses

import pytest
import torch
from ranks import spawn
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fp8 import convert_linears
from lightning_fp8.compute import end_step
from lightning_fp8.compute.recipe import PRESETS, ROLES, Operand, Recipe, resolve_recipe
from lightning_fp8.compute.scaling import DelayedScales, advance
from lightning_fp8.numerics import E4M3, E5M2

DELAYED = PRESETS["delayed"]
CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def linear(recipe="delayed", k=64, n=32, bias=False, seed=0, **options):
    torch.manual_seed(seed)
    layer = nn.Linear(k, n, bias=bias).bfloat16()
    convert_linears(layer, recipe, **options)
    return layer


def batch(*shape, seed=1, scale=1.0, requires_grad=True):
    x = (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()
    return x.requires_grad_(requires_grad)


def largest(x):
    return x.detach().abs().max().item()


def observe(state, *amaxes):
    """One pass: an amax for each operand, None where it was not seen."""
    for role, amax in zip(ROLES, amaxes, strict=True):
        if amax is not None:
            state.observe(role, torch.tensor(amax))


def same(a, b):
    """Every tensor of two states is the same bit for bit."""
    pairs = zip(
        (*a.running, a.history, a.scale, a.nonfinite), (*b.running, b.history, b.scale, b.nonfinite), strict=True
    )
    return all(torch.equal(p, q) for p, q in pairs)


def test_a_step_enters_the_history_once_with_the_largest_of_its_micro_batches():
    state = DelayedScales.unknown(3, CPU)
    for amaxes in ([(1.0, 2.0, 3.0), (4.0, 1.0, 2.0)], [(0.5, 0.25, 8.0)], [(16.0, 0.5, 1.0)], [(2.0, 2.0, 2.0)]):
        for micro_batch in amaxes:
            observe(state, *micro_batch)
        advance([state], DELAYED)
    assert state.history.tolist() == [[2.0, 16.0, 0.5], [2.0, 0.5, 0.25], [2.0, 1.0, 8.0]]  # the first has left
    assert [cell.item() for cell in state.running] == [-1.0] * 3


@pytest.mark.parametrize(("amax", "margin"), [("max", 0), ("max", 2), ("most_recent", 0), ("most_recent", 1)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_scale_follows_the_history(amax, margin, power_of_two):
    recipe = Recipe(input=Operand(power_of_two=power_of_two), scaling="delayed", amax=amax, margin=margin, history=4)
    state = DelayedScales.unknown(4, CPU)
    for value in (3.0, 100.0, 5.0):
        observe(state, value, value, value)
        advance([state], recipe)
    expected = {"max": 100.0, "most_recent": 5.0}[amax] * 2**margin
    exact = [torch.tensor(expected) / fmt.max for fmt in (E4M3, E4M3, E5M2)]
    if power_of_two:
        exact[0] = 2.0 ** torch.ceil(torch.log2(exact[0]))
    assert torch.equal(state.scale, torch.stack(exact))


def test_what_was_not_seen_keeps_its_history_and_scale():
    state = DelayedScales.unknown(2, CPU)
    observe(state, 1.0, 2.0, 3.0)
    advance([state], DELAYED)
    before = copy.deepcopy(state)
    advance([state], DELAYED)
    assert same(state, before)
    observe(state, 5.0, None, None)
    advance([state], DELAYED)
    assert state.history.tolist() == [[5.0, 1.0], [2.0, 0.0], [3.0, 0.0]]
    assert torch.equal(state.scale[1:], before.scale[1:])


@pytest.mark.parametrize("poison", [NAN, INF])
def test_a_step_that_was_not_finite_is_counted_and_forgotten(poison):
    state = DelayedScales.unknown(2, CPU)
    observe(state, 1.0, 2.0, 3.0)
    advance([state], DELAYED)
    before = copy.deepcopy(state)
    observe(state, poison, 4.0, None)
    observe(state, 7.0, 4.0, None)  # a finite micro-batch does not wash it out
    advance([state], DELAYED)
    assert state.nonfinite.tolist() == [1, 0, 0]
    assert torch.equal(state.history[0], before.history[0])
    assert state.scale[0] == before.scale[0]
    assert state.history[1].tolist() == [4.0, 2.0]
    assert [cell.item() for cell in state.running] == [-1.0] * 3


def test_a_scale_too_large_for_fp32_stops_at_its_end():
    state = DelayedScales.unknown(1, CPU)
    observe(state, torch.finfo(torch.float32).max, 1.0, 1.0)
    advance([state], resolve_recipe({"preset": "delayed", "margin": 4}))
    assert state.scale.isfinite().all()


class Operations(TorchDispatchMode):
    """Notes every tensor operation that reaches the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operations_of_a_step(layers):
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(layers)])
    convert_linears(model, "delayed")
    model(torch.randn(16, 16)).sum().backward()
    with Operations() as seen:
        end_step(model)
    return seen.names


def test_a_step_takes_the_same_number_of_operations_for_any_number_of_layers():
    few, many = operations_of_a_step(1), operations_of_a_step(24)
    assert few == many
    assert len(few) > 10  # something was counted


def test_nothing_is_read_back_to_the_host():
    layer, x = linear(bias=True), batch(16, 64)
    with Operations() as seen:
        for _ in range(2):
            layer(x).sum().backward()
            end_step(layer)
    assert any("amax" in name or "aminmax" in name for name in seen.names)
    reads = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal.default")
    assert not [name for name in seen.names if any(f"aten.{read}" in name for read in reads)]


def _on_a_rank(folder):
    """One of two processes: each sees other magnitudes; all ranks must come to the same scales."""
    rank = torch.distributed.get_rank()
    calls, all_reduce = [], torch.distributed.all_reduce

    def counted(*args, **kwargs):
        calls.append(args)
        return all_reduce(*args, **kwargs)

    torch.distributed.all_reduce = counted
    model = nn.Sequential(linear(n=64, seed=3), linear(seed=4))
    x = batch(16, 64, seed=rank, scale=1.0 + 9.0 * rank)
    model(x).sum().backward()
    if rank == 1:
        model[1].fp8_scales.running[2].fill_(NAN)  # what one rank cannot use, no rank uses
    end_step(model)
    states = [layer.fp8_scales for layer in model]
    torch.save(
        {"calls": len(calls), "amax": largest(x), "states": [dataclasses.asdict(s) for s in states]}, folder / str(rank)
    )


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_ranks_agree_on_the_largest_magnitude_in_one_reduction(tmp_path):
    spawn(_on_a_rank, 2, tmp_path)
    first, second = (torch.load(tmp_path / str(rank), weights_only=True) for rank in (0, 1))
    assert first["calls"] == second["calls"] == 1
    assert first["amax"] != second["amax"]
    assert first["states"][0]["history"][0, 0] == max(first["amax"], second["amax"])
    for a, b in zip(first["states"], second["states"], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("history", "scale", "nonfinite"))
    assert first["states"][1]["nonfinite"].tolist() == [0, 0, 1]
