"""Checkpoints of one strategy and number of processes, read by others: the same bits, and the very next batch."""

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from multi import contents, different, fit
from ranks import spawn

from lightning_fp8 import FP8Precision
from lightning_fp8.callbacks import LastCheckpoint

WRITERS = ("ddp", "fsdp2", "fsdp2 full")
STEPS, BATCH = 2, 12  # of which 1, 2, 3 and 4 processes read 12, 6, 4 and 3
OPTIONS = {"batch": BATCH, "enable_checkpointing": True}


def plugin():
    return FP8Precision("delayed", weights="bf16")


class AtStart(Callback):
    """What a fit starts from: its state, and the sequences of the first batch of all processes."""

    def on_train_start(self, trainer, pl_module):
        self.state = contents(trainer, pl_module)
        self.step = trainer.global_step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        parts = [torch.empty_like(batch) for _ in range(trainer.world_size)]
        if trainer.world_size > 1:
            dist.all_gather(parts, batch.contiguous())
        else:
            parts = [batch]
        self.batch = torch.cat(parts) if not hasattr(self, "batch") else self.batch


def write(folder, data, name):
    """Writes a checkpoint after STEPS steps, and beside it what the next step started from."""
    target = folder / name.replace(" ", "-")
    last = LastCheckpoint(every_n_steps=STEPS)
    trainer, model, _ = fit(target, data, name, plugin(), steps=STEPS, callbacks=[last], **OPTIONS)
    state = contents(trainer, model)
    if trainer.is_global_zero:
        torch.save(state, target / "expected.pt")
    dist.barrier()
    return target / "checkpoints/last.ckpt"


def check(folder, data, writer, reader):
    target = folder / writer.replace(" ", "-")
    start = AtStart()
    path = target / "checkpoints/last.ckpt"
    fit(folder, data, reader, plugin(), steps=STEPS + 1, resume=str(path), seed=7, callbacks=[start], **OPTIONS)
    assert start.step == STEPS
    assert different(torch.load(target / "expected.pt"), start.state) == [], (writer, reader)
    return start.batch


def write_and_read(folder, data):
    for name in WRITERS:
        path = write(folder, data, name)
        assert path.is_dir() is (name == "fsdp2")
    batches = [check(folder, data, writer, writer) for writer in WRITERS]
    batches += [check(folder, data, "ddp", "fsdp2"), check(folder, data, "fsdp2 full", "ddp")]
    if dist.get_rank() == 0:
        torch.save(batches[0], folder / "batch.pt")
    assert all(torch.equal(batch, batches[0]) for batch in batches)


def read_elsewhere(folder, data):
    expected = torch.load(folder / "batch.pt")
    for writer, reader in (("fsdp2", "fsdp2"), ("fsdp2 full", "fsdp2"), ("ddp", "ddp"), ("fsdp2 full", "alone")):
        assert torch.equal(check(folder, data, writer, reader), expected)


def test_two_processes_read_what_two_wrote_by_any_strategy(prepared, tmp_path):
    spawn(write_and_read, 2, tmp_path, prepared)


@pytest.mark.slow
@pytest.mark.parametrize(("writers", "readers"), [(2, (3,)), (4, (2, 3))])
def test_other_numbers_of_processes_read_it(writers, readers, prepared, tmp_path):
    """As many as the readers say, and one."""
    for function, processes in ((write_and_read, writers), *((read_elsewhere, many) for many in readers)):
        (tmp_path / "rendezvous").unlink(missing_ok=True)
        spawn(function, processes, tmp_path, prepared)
