"""Short runs with a guard, whose data are poisoned where a test says so."""

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from small_models import QUIET

from lightning_fp8 import FP8Precision
from lightning_fp8.callbacks.guard import FP8Guard, RewindRule, SpikeRule
from lightning_fp8.data import TokenDataModule
from lightning_fp8.models import DecoderConfig, DecoderLM
from lightning_fp8.optim import FP8AdamW, WarmupCosine

SHAPE = DecoderConfig(vocab_size=272, hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=64)
DELAYED = {"preset": "delayed", "history": 4}
STEPS = 24


class Poisoned(DecoderLM):
    """A decoder whose loss depends on random numbers, up to the part `noise`; some batches are bad."""

    def __init__(self, bad=(), optimizer=FP8AdamW, kind="loss", noise=0.2):
        super().__init__(SHAPE, optimizer=optimizer, schedule=WarmupCosine(warmup_steps=2))
        self.bad = [tuple(batch.flatten().tolist()) for batch in bad]
        self.kind, self.noise = kind, noise
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.clone())
        loss = super().training_step(batch, batch_idx) * (1 + self.noise * torch.rand(()))
        if tuple(batch.flatten().tolist()) not in self.bad:
            return loss
        return loss * float("nan") if self.kind == "nan" else 20 * loss


def data_of(folder, batch_size=2):
    return TokenDataModule(str(folder), sequence_length=8, batch_size=batch_size)


def batches_of(folder, n, *, rank=0, world_size=1, batch_size=2):
    """The first `n` batches of the stream that a rank gets, over as many epochs as that takes."""
    loader = data_of(folder, batch_size).train_dataloader()
    loader._batches.rank, loader._batches.world_size = rank, world_size
    found = []
    while len(found) < n:
        found += [batch for _, batch in zip(range(n - len(found)), loader, strict=False)]
    return found


def guard(**options):
    """One that is quick to see and to go back."""
    defaults = {
        "alarms": [],
        "spikes": SpikeRule(window=8, arm_after=3, consecutive=2),
        "rewind": RewindRule(snapshot_every=6, margin=0),
        "check_every": 2,
    }
    return FP8Guard(**{**defaults, **options})


def run(folder, data, *callbacks, bad=(), seed=0, resume=None, steps=STEPS, stop=None, batch_size=2, **options):
    """Trains; returns the module, and the final checkpoint without what callbacks keep. `stop` kills the run there."""
    seed_everything(seed, verbose=False)
    module = Poisoned(bad, **{name: options.pop(name) for name in ("optimizer", "kind", "noise") if name in options})
    saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=stop or steps, save_top_k=-1)
    trainer = Trainer(
        max_steps=steps,
        plugins=[FP8Precision(DELAYED, weights="bf16", bf16_first_steps=1)],
        callbacks=[*callbacks, *([Killed(stop)] if stop else []), saves],
        default_root_dir=folder,
        limit_val_batches=0,
        **{**QUIET, **options},
    )
    try:
        trainer.fit(module, datamodule=data_of(data, batch_size), ckpt_path=resume)
    except KilledError:
        return module, None
    return module, checkpoint(folder, steps)


class KilledError(Exception):
    pass


class Killed(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise KilledError


def checkpoint(folder, step):
    """A saved checkpoint, without the state of callbacks and without counts of epochs and batches."""
    saved = torch.load(f"{folder}/step={step}.ckpt", weights_only=True)
    return {k: v for k, v in saved.items() if k != "callbacks"}


def trained(saved):
    """What training has made, without the loops' counts and the place in the data."""
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "FP8Precision", "global_step")
    return {part: saved[part] for part in parts}
