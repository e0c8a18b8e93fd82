"""Transformer Engine's backend on two real processes, under DDP and under ModelParallelStrategy."""

import pytest
import torch
import torch.distributed as dist
import transformer_engine_on_cpu
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import spawn
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformer_engine_on_cpu import cpu_taken_for_gpu, gemms

from lightning_fp8 import FabricFP8Precision, FP8Precision, fp8_state_dict
from lightning_fp8.compute import convert_to_transformer_engine
from lightning_fp8.optim import FP8AdamW

DELAYED = {"preset": "delayed", "history": 4}
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 16))
        self.largest = []

    def training_step(self, batch, batch_idx):
        batch = batch * 10**self.global_rank  # magnitudes differ from rank to rank
        self.largest.append(batch.abs().max())
        return (self.net(batch).float() - batch[:, :16].float()).square().mean()

    def configure_optimizers(self):
        return FP8AdamW(self.named_parameters(), lr=1e-2)


class Sharded(Regression):
    """Converted before it is sharded, as the backend asks for."""

    def configure_model(self):
        convert_to_transformer_engine(self, DELAYED)
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class ShardedTooEarly(Regression):
    def configure_model(self):
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def batches(n=16):
    torch.manual_seed(3)
    return DataLoader(list(torch.randn(16 * n, 32)), batch_size=16)


def fit(folder, model, plugin, ckpt_path=None, **options):
    trainer = Trainer(default_root_dir=folder, plugins=[plugin], devices=2, **{**QUIET, "max_epochs": 1, **options})
    trainer.fit(model, batches(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def plugin():
    return FP8Precision(DELAYED, backend="transformer_engine", weights="bf16")


def tensors(state):
    return {f"{layer}.{key}": value for layer, saved in state["layers"].items() for key, value in saved.items()}


def gathered(value):
    values = [None, None]
    dist.all_gather_object(values, value)
    return values


def check_ddp(folder):
    options = {"strategy": "ddp", "accumulate_grad_batches": 2, "enable_checkpointing": False}
    through = Regression()
    gemms.clear()
    fit(folder, through, plugin(), max_epochs=2, **options)
    assert sum(gemm.fp8_operands == 2 for gemm in gemms) == 2 * 8 * (3 + 2)  # each rank has half of the batches
    expected = tensors(fp8_state_dict(through))
    weights = [p.detach().float() for p in through.parameters()]
    own = [w.double().sum().item() for w in weights], {k: v for k, v in expected.items() if "recipe" not in k}
    (first, scales), (second, others) = gathered(own)
    assert first == second
    assert scales.keys() == others.keys()
    assert all(torch.equal(scales[key], others[key]) for key in scales)  # one history for all ranks
    largest = [max(values) for values in gathered([x.item() for x in through.largest[-2:]])]
    assert largest[1] > 5 * largest[0]
    assert scales["net.0.amax_history_fwd"][-1, 0].item() == gathered(through.largest[-1].item())[1]

    half = Regression()
    fit(folder, half, plugin(), **options).save_checkpoint(folder / "half.ckpt")
    dist.barrier()
    resumed = Regression()
    fit(folder, resumed, plugin(), folder / "half.ckpt", max_epochs=2, **options)
    assert all(torch.equal(a, b) for a, b in zip(through.parameters(), resumed.parameters(), strict=True))
    found = tensors(fp8_state_dict(resumed))
    assert all(torch.equal(found[key], value) for key, value in expected.items() if "recipe" not in key)


def check_fabric():
    fabric = Fabric(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        plugins=[FabricFP8Precision(DELAYED, backend="transformer_engine")],
    )
    fabric.launch()
    net = Regression().net
    wrapped, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    before = net[0].weight.detach().clone()
    for batch in fabric.setup_dataloaders(batches(4)):
        fabric.backward(wrapped(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(net[0].weight, before)
    first, second = gathered(net[0].weight.double().sum().item())
    assert first == second


def check_sharded(folder):
    strategy = {"strategy": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)}
    model = Sharded()
    before = [p.detach().clone() for p in model.parameters()]
    gemms.clear()
    fit(folder, model, plugin(), enable_checkpointing=False, **strategy)
    assert sum(gemm.fp8_operands == 2 for gemm in gemms) == 8 * (3 + 2)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    after = [p.full_tensor().float() for p in model.parameters()]
    assert all(p.isfinite().all() and not torch.equal(p, q) for p, q in zip(after, before, strict=True))
    strategy = {"strategy": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)}
    with pytest.raises(ValueError, match=r"net\.0 is sharded already.*convert_to_transformer_engine.*configure_model"):
        fit(folder, ShardedTooEarly(), plugin(), enable_checkpointing=False, **strategy)


def on_a_rank(folder):
    transformer_engine_on_cpu.install()
    with cpu_taken_for_gpu():
        check_ddp(folder)
        check_fabric()
        check_sharded(folder)


def test_two_processes_train_resume_and_shard(python_layer, tmp_path):
    spawn(on_a_rank, 2, tmp_path)
