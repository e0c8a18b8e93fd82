"""The plugin under ModelParallelStrategy: a smoke test on two real processes."""

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import spawn
from small_models import Regression, batches, trainer
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_fp8 import FP8Linear, FP8Precision
from lightning_fp8.compute.gemm import record_gemms


class Sharded(Regression):
    """Sharded as a whole, as the strategy asks for."""

    def configure_model(self):
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def on_a_rank(folder):
    torch.manual_seed(0)
    model = Sharded()
    before = [p.detach().clone() for p in model.parameters()]
    # Without data_parallel_size the strategy shards over one process, that is nothing.
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    with record_gemms() as gemms:
        trainer(folder, FP8Precision("delayed"), strategy=strategy, devices=2).fit(model, batches(4))
    assert len(gemms) == 2 * (3 + 2)  # two of the four batches
    assert all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in model.parameters())
    assert isinstance(model.net[0], FP8Linear)
    after = [p.full_tensor() for p in model.parameters()]
    assert all(torch.isfinite(p).all() and not torch.equal(p, q) for p, q in zip(after, before, strict=True))
    assert all((layer.fp8_scales.history > 0).sum(1).tolist() == [2, 2, 2] for layer in model.net[::2])


def test_a_model_sharded_over_two_processes_trains(tmp_path):
    spawn(on_a_rank, 2, tmp_path)
