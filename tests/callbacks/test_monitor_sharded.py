"""FSDP2 on two real processes, where weights are DTensors: the figures are those of DDP, whose weights are whole.

Data of a rank are the same under both, and so is the model at the first step: what differs is the order of sums alone.
Later steps differ by what that becomes.
"""

import json
import math

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from ranks import spawn
from torch.distributed.tensor import DTensor

from lightning_fp8.callbacks.watch import table
from tests.callbacks.monitored import LAYERS, fit, health_tracked, listening, model

STEPS = 2


def strategy(name):
    return DDPStrategy() if name == "ddp" else ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def weights(trainer):
    named = trainer.model.named_parameters()
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in named}


def run(folder, data, name, *callbacks):
    options = {"strategy": strategy(name), "devices": 2, "use_distributed_sampler": False, "steps": STEPS}
    return fit(folder, data, *callbacks, module=model(optimizer=health_tracked), **options)


def on_a_rank(folder, data):
    read, sharded = {}, None
    for name in ("ddp", "fsdp2"):
        monitor, readings = listening()
        trainer = run(folder / name, data, name, monitor)
        read[name] = [reading.values for reading in readings]
        sharded = trainer
    assert any(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in sharded.model.parameters())
    watched, alone = weights(sharded), weights(run(folder / "alone", data, "fsdp2"))
    assert watched.keys() == alone.keys()
    assert all(torch.equal(watched[name], alone[name]) for name in alone)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(read))


def test_sharded_layers_have_the_figures_of_whole_ones(prepared, tmp_path):
    spawn(on_a_rank, 2, tmp_path, prepared)
    read, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert str(read) == str(other)  # ranks agree; as text, for NaN is not equal to itself
    assert len(table.read(tmp_path / "fsdp2")) == STEPS  # one rank writes
    whole, sharded = read["ddp"], read["fsdp2"]
    assert [list(values) for values in whole] == [list(values) for values in sharded]
    for layer, roles in whole[0].items():
        assert roles.keys() == sharded[0][layer].keys()
        for role, figures in roles.items():
            found = sharded[0][layer][role]
            assert found.keys() == figures.keys()
            for metric, expected in figures.items():
                close = math.isclose(found[metric], expected, rel_tol=1e-4, abs_tol=1e-6)
                assert close or math.isnan(expected), (layer, role, metric, found[metric], expected)
    for values in (*whole, *sharded):
        assert {name for name in LAYERS if "update" in values[name]} == set(LAYERS)
        assert all(values[name][role]["amax"] > 0 for name in LAYERS for role in ("input", "weight", "grad_output"))
