"""Checkpoints that are written in the background hold the state of their step; a kill in the middle leaves the last."""

import os
import signal
import threading
from pathlib import Path

import jobs
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from multi import contents, different, fit
from ranks import spawn
from states import differences

from lightning_fp8 import FP8Precision
from lightning_fp8.callbacks import LastCheckpoint
from lightning_fp8.checkpoint.integrity import check_checkpoint

EVERY, STEPS = 2, 6
OPTIONS = {"enable_checkpointing": True, "batch": 6}


def plugin():
    return FP8Precision("delayed", weights="bf16")


class Late(TorchCheckpointIO):
    """Writes the first checkpoint when training has gone on for `steps` steps."""

    def __init__(self):
        self.may_write, self.written = threading.Event(), []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        assert self.may_write.wait(60)
        super().save_checkpoint(checkpoint, path, storage_options)
        self.written.append(checkpoint["global_step"])


class Release(Callback):
    """Looks at the folder while nothing may be written, then lets it be, and keeps what was written first."""

    def __init__(self, io, folder):
        self.io, self.folder = io, folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == EVERY + 1:
            assert not (self.folder / "last.ckpt").exists()
            assert self.io.written == []
            self.io.may_write.set()
            trainer.strategy.checkpoint_io.teardown()  # waits
            os.rename(self.folder / "last.ckpt", self.folder / "first.ckpt")


def test_what_is_written_in_the_background_is_the_state_of_its_step(prepared, tmp_path):
    at_once, behind = tmp_path / "at-once", tmp_path / "behind"
    fit(at_once, prepared, plugin=plugin(), steps=STEPS, callbacks=[Keep(), LastCheckpoint(EVERY)], **OPTIONS)
    io = Late()
    folder = behind / "checkpoints"
    options = {"callbacks": [Release(io, folder), LastCheckpoint(EVERY)], "plugins": [AsyncCheckpointIO(io)]}
    fit(behind, prepared, plugin=plugin(), steps=STEPS, **options, **OPTIONS)
    assert io.written == [2, 4, 6]
    assert sorted(path.name for path in folder.iterdir()) == ["first.ckpt", "last.ckpt", "last.ckpt.previous"]
    for name in ("first.ckpt", "last.ckpt"):
        expected, found = (torch.load(run / "checkpoints" / name, weights_only=True) for run in (at_once, behind))
        for state in (expected, found):
            del state["callbacks"]  # which know their folder
        assert differences(expected, found) == []


class Keep(Callback):
    """Keeps the first checkpoint."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        folder = os.path.join(trainer.default_root_dir, "checkpoints")
        if trainer.global_step == EVERY:
            os.rename(os.path.join(folder, "last.ckpt"), os.path.join(folder, "first.ckpt"))


def save_twice(folder, data, name, victim):
    """Writes a checkpoint, and what is in it; of a second one, `victim` dies with a part written and not the rest."""
    last = LastCheckpoint(EVERY)
    trainer, model, _ = fit(folder / "run", data, name, plugin(), steps=EVERY, callbacks=[last], **OPTIONS)
    if dist.get_rank() == 0:
        torch.save(contents(trainer, model), folder / "expected.pt")
    else:
        contents(trainer, model)
    dist.barrier()
    if dist.get_rank() == victim:
        kill_in_fsync() if name == "fsdp2" else kill_in_write()
    resume = str(folder / "run/checkpoints/last.ckpt")
    fit(folder / "run", data, name, plugin(), steps=2 * EVERY, resume=resume, callbacks=[last], **OPTIONS)


def kill_in_fsync():
    """DCP calls it when a rank's file is written, before the metadata are."""
    os.fsync = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def kill_in_write():
    """After half the bytes of a file."""
    import lightning.fabric.plugins.io.torch_io as torch_io

    def half(checkpoint, path):
        torch.save(checkpoint, path)
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    torch_io._atomic_save = half


def resume(folder, data, name):
    class Found(Callback):
        def on_train_start(self, trainer, pl_module):
            self.state = contents(trainer, pl_module)

    found = Found()
    path = str(folder / "run/checkpoints/last.ckpt")
    fit(folder / "again", data, name, plugin(), steps=EVERY + 1, resume=path, callbacks=[found], **OPTIONS)
    assert different(torch.load(folder / "expected.pt"), found.state) == []


@pytest.mark.parametrize(
    ("name", "victim"), [("fsdp2", 1), pytest.param("ddp", 0, marks=pytest.mark.slow)], ids=["sharded", "file"]
)
def test_a_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before(prepared, tmp_path, name, victim):
    with pytest.raises(Exception, match=r"SIGKILL|Connection|gloo"):
        spawn(save_twice, 2, tmp_path, prepared, name, victim)
    left = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert left == {"last.ckpt", "last.ckpt.unfinished"}
    (tmp_path / "rendezvous").unlink(missing_ok=True)
    spawn(resume, 2, tmp_path, prepared, name)


def damage(checkpoint):
    """Turns a bit of a file over, or of the last shard of a folder, which no process but the last reads."""
    path = Path(max(checkpoint.glob("*.distcp")) if checkpoint.is_dir() else checkpoint)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("strategy", "torchrun", "options"),
    [
        ("strategy/fsdp2", ("--standalone", "--nproc-per-node", "2"), ()),
        pytest.param("strategy/ddp", (), ("--trainer.devices=2",), marks=pytest.mark.slow),
    ],
    ids=["sharded", "file"],
)
def test_all_processes_take_the_checkpoint_before_a_damaged_one(prepared, tmp_path, strategy, torchrun, options):
    def fit(*more):
        return jobs.fit(tmp_path, prepared, *options, *more, strategy=strategy, torchrun=torchrun)

    status, printed = fit()  # saves 2, 4, 6 and 8
    assert status == 0, printed[-3000:]
    expected, last = jobs.curve(tmp_path), tmp_path / "run/checkpoints/last.ckpt"
    previous = last.with_name("last.ckpt.previous")
    damage(last)
    status, printed = fit("--ckpt_path=last")
    assert status == 0, printed[-3000:]
    assert printed.count("Going on from the one before it") == 1
    assert jobs.curve(tmp_path) == expected
    for path in (last, previous):  # the damaged one has taken no other's place
        check_checkpoint(path)
    damage(last)
    damage(previous)
    status, printed = fit("--ckpt_path=last")
    assert status == 1
    assert f"{previous.name}" in printed
    assert "--ckpt_path PATH" in printed
    assert "lightning-fp8: " in printed
    assert "ValueError" not in printed  # no traceback but torchrun's own
