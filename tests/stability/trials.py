"""Short runs of a small decoder in the Trainer, monitored and guarded: what a fault does, and when it is seen.

A run is a function of its `Setup` and seed, and is kept: rows of the table of faults share their clean runs. What
differs between the runs of a row is the fault or its cure alone; weights and data are those of the seed.
"""

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from math import cos, pi
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from small_models import QUIET
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from trained_decoders import SMALL, evaluate, fp32_states

from lightning_fp8 import FP8Precision, Recipe
from lightning_fp8.callbacks import FP8Guard, FP8Monitor
from lightning_fp8.callbacks.guard import FallbackRule, RewindRule, SpikeRule
from lightning_fp8.callbacks.guard.events import Event
from lightning_fp8.callbacks.readings import Reading
from lightning_fp8.data.synthetic import SyntheticBatches, TokenSource, skip_bigram
from lightning_fp8.models import Decoder, DecoderConfig

BATCH, LENGTH, WARM_UP = 16, 33, 20
SPIKES = SpikeRule(window=30, arm_after=20)
REWIND = RewindRule(snapshot_every=20, on_disk=False)


@dataclass(frozen=True)
class Setup:
    """A way to train.

    Attributes:
        source: Of the tokens, a function that always returns the same one.
        steps: Optimizer steps, the first 20 of them a warm-up to `lr`, which falls along half a cosine.
        end: The share of `lr` that it falls to.
        config: Of the decoder; its vocabulary is the source's.
        recipe: Of the FP8 plugin; None trains in BF16 without it.
        weights: What the plugin makes of them.
        optimizer: (model, learning rate) -> optimizer.
        prepare: Done to the decoder before anything else.
        loss_scale: What the loss is multiplied by.
        faults: Make callbacks that do harm, first of all callbacks.
        during: Makes a context that the run and its evaluation are in.
        sample_every: Steps between two samples of the monitor.
        guard: What the guard may do, as its arguments; by default it only looks.
    """

    source: Callable[[], TokenSource]
    steps: int
    lr: float
    end: float = 0.0
    config: DecoderConfig = SMALL
    recipe: str | Recipe | None = None
    weights: Any = "fp32"
    optimizer: Callable[[Decoder, float], Optimizer] = fp32_states
    prepare: Callable[[Decoder], object] = lambda model: None
    loss_scale: float = 1.0
    faults: tuple[Callable[[], Callback], ...] = ()
    during: Callable[[], AbstractContextManager[Any]] = nullcontext
    sample_every: int = 5
    guard: tuple[tuple[str, Any], ...] = ()


class Run(NamedTuple):
    """What came of it: the loss on held-out tokens, nats; what the guard said; what the monitor read."""

    loss: float
    events: tuple[Event, ...]
    readings: tuple[Reading, ...]

    def first(self, detector: str) -> int | None:
        """The step of the first event of this kind, or about this metric."""
        seen = [e.step for e in self.events if e.kind == detector or (e.metric or "").endswith(detector)]
        return min(seen, default=None)


class Toy(LightningModule):
    """A decoder whose training step is that of a `Setup`."""

    def __init__(self, setup: Setup, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.setup_ = setup
        self.decoder = Decoder(replace(setup.config, vocab_size=setup.source().vocab_size))
        setup.prepare(self.decoder)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.decoder(batch[:, :-1], batch[:, 1:])
        return loss * self.setup_.loss_scale

    def configure_optimizers(self) -> Any:
        optimizer = self.setup_.optimizer(self.decoder, self.setup_.lr)
        schedule = LambdaLR(optimizer, self.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def rate(self, step: int) -> float:
        end = self.setup_.end
        fall = end + (1 - end) * (1 + cos(pi * min(1.0, step / self.setup_.steps))) / 2
        return min(1.0, (step + 1) / WARM_UP) * fall


@cache
def run(setup: Setup, seed: int, **options: Any) -> Run:
    """Trains and evaluates; `options` are the Trainer's. Of several processes each has its own data."""
    readings: list[Reading] = []
    monitor = FP8Monitor(every_n_steps=setup.sample_every)
    monitor.listeners.append(lambda _, reading: readings.append(reading))
    looks = {"fallback": FallbackRule(max_fallbacks=0), "spikes": SPIKES, "rewind": None, "check_every": 5}
    guard = FP8Guard(**{**looks, **dict(setup.guard)})
    precision = {"precision": "bf16-mixed"} if setup.recipe is None else {"plugins": [_plugin(setup)]}
    rank = dist.get_rank() if dist.is_initialized() else 0
    data = SyntheticBatches(setup.source(), 2 * setup.steps, BATCH, LENGTH, seed=seed + 1000 * rank)
    with tempfile.TemporaryDirectory() as folder, setup.during():
        module = Toy(setup, seed)
        trainer = Trainer(
            max_steps=setup.steps,
            callbacks=[*(fault() for fault in setup.faults), monitor, guard],
            default_root_dir=folder,
            enable_checkpointing=False,
            use_distributed_sampler=False,
            **{**QUIET, **precision, **options},
        )
        trainer.fit(module, DataLoader(data, batch_size=None))
        mixed = next(module.parameters()).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = evaluate(module.decoder, setup.source())
    return Run(loss, guard.events, tuple(readings))


def _plugin(setup: Setup) -> FP8Precision:
    assert setup.recipe is not None
    return FP8Precision(setup.recipe, weights=setup.weights)


@cache
def skips() -> TokenSource:
    """The task that needs attention."""
    return skip_bigram()
