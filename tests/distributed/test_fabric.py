"""DDP and FSDP2 through Fabric, on real processes: what one process would have computed, in a loop of one's own."""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from lightning import seed_everything
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from multi import SHAPE, assert_all_have, different, smooth, state_of, whole
from ranks import spawn
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lightning_fp8 import FabricFP8Precision, Recipe, convert_linears
from lightning_fp8.checkpoint import load_fabric_state
from lightning_fp8.data import TokenDataModule
from lightning_fp8.models import Decoder
from lightning_fp8.models.sharding import materialize, shard
from lightning_fp8.optim import FP8AdamW, decay_groups

STRATEGIES = ("ddp", "fsdp2")
RECIPES = {"none": None, "shared scales": Recipe(sync_amax=True)}
BATCH, ACCUMULATE, STEPS = 8, 2, 4
CLIP = 0.1  # gradients have a norm of about 2


class Run(NamedTuple):
    """What a loop saw and ended with; losses are of all processes, batch by batch, and norms before clipping."""

    losses: torch.Tensor
    norms: torch.Tensor
    batches: list
    state: dict
    moments: torch.Tensor


def cut(decoder, mesh):
    return materialize(shard(decoder, mesh["data_parallel"]), torch.device("cpu"))


def loop(folder, data, name, *, plugin=None, recipe=None, optimizer=smooth, seed=0, resume=False):
    """Trains, or resumes what an earlier call saved after half of the steps."""
    processes = 1 if name == "alone" else dist.get_world_size()
    sharded = ModelParallelStrategy(cut, data_parallel_size=processes, tensor_parallel_size=1)
    fabric = Fabric(
        accelerator="cpu",
        devices=processes,
        # DDP lays its buckets out anew after its first step, and a ring of three or more then sums in another order: a
        # resumed loop is the whole one bit for bit where it does not, which is where it looks for unused parameters.
        strategy={"alone": "auto", "ddp": DDPStrategy(find_unused_parameters=True), "fsdp2": sharded}[name],
        plugins=[plugin] if plugin else None,
    )
    fabric.launch()
    seed_everything(seed, verbose=False)
    with fabric.init_module(empty_init=name == "fsdp2"):
        decoder = Decoder(SHAPE)
    if recipe:
        convert_linears(decoder, recipe)  # in fp32 otherwise, where the plugin computes in bf16
    decoder = fabric.setup_module(decoder)
    groups = decay_groups(nn.ModuleDict({"decoder": decoder.module}))
    optimizer = fabric.setup_optimizers(optimizer(groups))
    sequences = BATCH // (processes * ACCUMULATE)
    loader = TokenDataModule(str(data), sequence_length=16, batch_size=sequences).train_dataloader()
    loader = fabric.setup_dataloaders(loader, use_distributed_sampler=False)
    state = {"model": decoder, "optimizer": optimizer, "loader": loader, "step": 0}
    state |= {"fp8": plugin} if plugin else {}
    if resume:
        load_fabric_state(fabric, folder / name, state)
    losses, norms, batches = [], [], []
    for batch in loader:
        batches.append(batch)
        ends = len(batches) % ACCUMULATE == 0
        with fabric.no_backward_sync(decoder, enabled=not ends):
            loss = F.cross_entropy(decoder(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())
            fabric.backward(loss / ACCUMULATE)
        losses.append(fabric.all_reduce(loss.detach(), reduce_op="mean").item())
        if not ends:
            continue
        norms.append(whole(fabric.clip_gradients(decoder, optimizer, max_norm=CLIP)).item())
        optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1
        if state["step"] == STEPS // 2 and not resume and plugin:
            fabric.save(folder / name, state)
        if state["step"] == STEPS:
            break
    found = state_of(decoder.module, optimizer.optimizer, plugin) if plugin else {}
    moments = optimizer.optimizer.state[decoder.module.blocks[0].mlp.up_proj.weight]
    numbers = (torch.tensor(values, dtype=torch.float64) for values in (losses, norms))
    return Run(*numbers, batches, found, moments.get("m_codes"))


def on_a_rank(folder, data, expected):
    for name in STRATEGIES:
        for recipe, alone in expected.items():
            same_losses(loop(folder, data, name, recipe=RECIPES[recipe]), *alone)
        everything_together(folder, data, name)


def same_losses(found, losses, norms):
    # fp32 sums in another order: 9e-8 of the loss under the Trainer.
    torch.testing.assert_close(found.losses, losses, rtol=2e-6, atol=0)
    torch.testing.assert_close(found.norms, norms, rtol=1e-5, atol=0)


def everything_together(folder, data, name):
    """Delayed scales, a step in bf16, accumulation, clipping: replicas agree; a resumed loop ends as a whole one."""
    runs = []
    for seed, resume in ((0, False), (1, True)):
        plugin = FabricFP8Precision("delayed", weights="bf16", bf16_first_steps=1)
        options = {"plugin": plugin, "optimizer": lambda groups: FP8AdamW(groups, lr=5e-3)}
        runs.append(loop(folder, data, name, seed=seed, resume=resume, **options))
    run, resumed = runs
    assert_all_have(run.state)
    assert different(run.state, resumed.state) == [], name
    half = STEPS // 2 * ACCUMULATE
    assert torch.equal(run.losses[half:], resumed.losses)
    assert all(torch.equal(a, b) for a, b in zip(run.batches[half:], resumed.batches, strict=True))
    histories = [value for key, value in run.state.items() if key.startswith("history")]
    assert len(histories) == 14
    assert all((history > 0).sum(1).tolist() == [STEPS - 1] * 3 for history in histories)
    assert run.moments.dtype is torch.uint8
    assert isinstance(run.moments, DTensor) is (name == "fsdp2")
    own = torch.stack(run.batches)
    others = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(others, own)
    assert sum(torch.equal(own, other) for other in others) == 1  # each process has sequences of its own


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_compute_what_one_does(processes, prepared, tmp_path):
    expected = {}
    for name, recipe in RECIPES.items():
        alone = loop(tmp_path, prepared, "alone", recipe=recipe)
        assert len(alone.losses) == STEPS * ACCUMULATE
        assert alone.losses[-2:].mean() < alone.losses[:2].mean() - 0.02  # it learns
        assert (alone.norms > 2 * CLIP).all()
        expected[name] = alone.losses, alone.norms
    assert not torch.equal(*(losses for losses, _ in expected.values()))
    spawn(on_a_rank, processes, tmp_path, prepared, expected)
