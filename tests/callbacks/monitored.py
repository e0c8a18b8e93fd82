"""Short monitored runs of a small decoder, for the tests of the monitor."""

import torch
from lightning.pytorch import Trainer

from lightning_fp8 import FP8Precision
from lightning_fp8.callbacks import FP8Monitor
from lightning_fp8.data import TokenDataModule
from lightning_fp8.models import DecoderConfig, DecoderLM
from lightning_fp8.optim import FP8AdamW, WarmupCosine

SHAPE = DecoderConfig(vocab_size=272, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=96)
LAYERS = [
    f"decoder.blocks.{i}.{part}"
    for i in range(2)
    for part in (
        *(f"attention.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
]
BATCH, LENGTH = 4, 8


def health_tracked(params):
    return FP8AdamW(params, lr=1e-2, track_health=True)


def model(**options):
    torch.manual_seed(0)
    return DecoderLM(SHAPE, **{"schedule": WarmupCosine(warmup_steps=1), **options})


def fit(folder, data, *callbacks, steps=4, module=None, recipe="tensorwise", ckpt_path=None, **options):
    """A finished Trainer; its model starts from the same weights every time."""
    fp8 = options.pop("plugins", [FP8Precision(recipe=recipe, weights="bf16")])
    defaults = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    trainer = Trainer(
        default_root_dir=folder,
        plugins=fp8,
        callbacks=list(callbacks),
        max_steps=steps,
        limit_val_batches=0,
        **{**defaults, **quiet, **options},
    )
    batches = TokenDataModule(str(data), sequence_length=LENGTH, batch_size=BATCH)
    trainer.fit(model() if module is None else module, datamodule=batches, ckpt_path=ckpt_path, weights_only=False)
    return trainer


def readings_of(monitor):
    """The list that the readings of `monitor` go into."""
    readings = []
    monitor.listeners.append(lambda trainer, reading: readings.append(reading))
    return readings


def listening(**options):
    """A monitor that reads every step unless told otherwise, and its readings."""
    monitor = FP8Monitor(**{"every_n_steps": 1, **options})
    return monitor, readings_of(monitor)
