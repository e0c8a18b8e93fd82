"""A run goes on with fewer processes, which accumulate more: the same global batches, so the same losses."""

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from multi import fit, smooth
from ranks import spawn

from lightning_fp8.callbacks import LastCheckpoint

STEPS, STOP, BATCH = 9, 3, 36  # an epoch has 171 sequences: 4 steps, and another half of one


class Batches(Callback):
    """The sequences of each optimizer step, of all processes, in order; and the end, like that of a job that dies."""

    def __init__(self, stop=None):
        self.stop, self.steps, self.parts = stop, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        parts = [torch.empty_like(batch) for _ in range(trainer.world_size)]
        if trainer.world_size > 1:
            dist.all_gather(parts, batch.contiguous())
        else:
            parts = [batch]
        self.parts += parts
        self.before = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > self.before:
            self.steps.append(torch.cat(self.parts).tolist())
            self.parts = []
        trainer.should_stop = trainer.global_step == self.stop


def run(folder, data, name, accumulate=1, stop=None, resume=None):
    """Sequences and mean loss of each optimizer step."""
    batches = Batches(stop)
    options = {"callbacks": [batches, LastCheckpoint(STOP)], "enable_checkpointing": True, "max_epochs": -1}
    options |= {"steps": STEPS, "batch": BATCH, "optimizer": smooth, "accumulate_grad_batches": accumulate}
    seen = fit(folder, data, name, resume=resume, **options)[2]
    return batches.steps, torch.tensor(seen.losses).view(-1, accumulate).mean(1)


def on_many(folder, data, name):
    whole = run(folder / "whole", data, name)
    part = run(folder / "part", data, name, stop=STOP)
    assert part[0] == whole[0][:STOP]
    assert torch.equal(part[1], whole[1][:STOP])
    if dist.get_rank() == 0:
        torch.save(whole, folder / "whole.pt")
    dist.barrier()


def go_on(folder, data, name, accumulate):
    steps, losses = torch.load(folder / "whole.pt")
    found = run(folder / "part", data, name, accumulate, resume=str(folder / "part/checkpoints/last.ckpt"))
    assert found[0] == steps[STOP:]
    assert [len(step) for step in found[0]] == [BATCH] * (STEPS - STOP)
    torch.testing.assert_close(found[1], losses[STOP:], rtol=2e-6, atol=0)  # fp32 sums in another order


def test_one_process_goes_on_for_two(prepared, tmp_path):
    spawn(on_many, 2, tmp_path, prepared, "fsdp2 full")
    go_on(tmp_path, prepared, "alone", 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_two_processes_go_on_for_four(prepared, tmp_path, name):
    spawn(on_many, 4, tmp_path, prepared, name)
    (tmp_path / "rendezvous").unlink(missing_ok=True)
    spawn(go_on, 2, tmp_path, prepared, name, 2)
