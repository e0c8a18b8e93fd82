"""`FP8Guard`: what a run sees going wrong, it does something about.

    an alarm on a layer                  warn, once for each reason
    an alarm that lasts                  that layer computes in BF16, until it has been calm for long    layers.py
    gradients that are not finite        the step is left out                                            nonfinite.py
    a loss spike that is confirmed       back to the older of two snapshots, without the data around it  recovery.py

Cheap and reversible actions follow from metrics, the dear one only from the loss itself: metrics that foretell spikes
are wrong far more often than there are spikes. Every decision is a function of numbers that all ranks have (a
`Reading`, the gathered losses) and of state that is in the checkpoint; so ranks agree without being told, and a run
that resumes decides as it would have.

Cost of a step in which nothing is due: no tensor operation and no host read; with an optimizer other than `FP8AdamW`
see `nonfinite.py`. Every `check_every` steps one host read takes all losses since the last and the number of steps left
out: a `stack` and, between processes, an all-gather of so many numbers. Every `snapshot_every` steps weights and
optimizer state are copied to host memory or disk, for which the host waits. A run in which nothing happens ends, bit
for bit, as it would without a guard.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fp8.callbacks.guard.alarms import DEFAULT_ALARMS, STALLED, Alarm
from lightning_fp8.callbacks.guard.events import Event, EventLog, finite
from lightning_fp8.callbacks.guard.layers import FallbackRule, LayerPolicy
from lightning_fp8.callbacks.guard.messages import event_of, say, summary
from lightning_fp8.callbacks.guard.recovery import LossSpikeError, Recovery, RewindRule
from lightning_fp8.callbacks.guard.snapshots import Snapshots
from lightning_fp8.callbacks.guard.spikes import SpikeRule
from lightning_fp8.callbacks.guard.trainer_state import leave_out, put_back, take
from lightning_fp8.callbacks.guard.watch import StepWatch
from lightning_fp8.callbacks.monitor import FP8Monitor
from lightning_fp8.callbacks.readings import Reading
from lightning_fp8.callbacks.run_log import RunLog
from lightning_fp8.compute.linear import fall_back

EVENTS = "events.jsonl"
SNAPSHOTS = "snapshots"


class FP8Guard(Callback):
    """Acts on alarms, non-finite gradients and loss spikes; see the module's docstring.

    List it after `FP8Monitor`, whose readings it acts on. What it does is said on the console, counted in the loggers
    as `guard/<action>` and written to `events.jsonl` in the run's folder.

    Args:
        alarms: Rules on the monitor's figures; None takes `DEFAULT_ALARMS`, an empty list needs no monitor.
        fallback: When a layer leaves FP8 and returns; None only warns.
        spikes: What counts as a spike; None does not look at the loss.
        rewind: How to go back after a spike; None only warns of it.
        check_every: Optimizer steps between reads of the loss. Snapshots are taken at multiples of it.
        skip_nonfinite: Leave out steps whose gradients are not finite. Optimizers of this library do so by themselves
            and are counted.

    Raises:
        ValueError: The rules do not go together, there is no monitor before it, or gradients are released in backward.
        LossSpikeError: The loss spikes again and again in one place.
    """

    def __init__(
        self,
        alarms: Sequence[Alarm] | None = None,
        fallback: FallbackRule | None = FallbackRule(),  # noqa: B008 (frozen)
        spikes: SpikeRule | None = SpikeRule(),  # noqa: B008
        rewind: RewindRule | None = RewindRule(),  # noqa: B008
        check_every: int = 10,
        skip_nonfinite: bool = True,
    ) -> None:
        if check_every < 1 or (spikes and rewind and rewind.snapshot_every % check_every):
            raise ValueError(
                f"FP8Guard: check_every is {check_every}; it must be at least 1 and divide rewind.snapshot_every, so"
                " that a snapshot is taken when all losses before it are known."
            )
        if spikes and rewind and rewind.snapshot_every < spikes.consecutive + rewind.margin + check_every:
            raise ValueError(
                f"FP8Guard: a spike is confirmed up to {spikes.consecutive + check_every} steps after its onset, when"
                f" both snapshots, {rewind.snapshot_every} steps apart, may be later: make rewind.snapshot_every larger"
                " or check_every smaller."
            )
        self.check_every = check_every
        self.skip_nonfinite = skip_nonfinite
        self.rewind = rewind
        self._alarms = alarms
        self._fallback = fallback or FallbackRule(max_fallbacks=0)
        self._spikes = spikes
        self._begin()

    def _begin(self) -> None:
        """The state of a run that has taken no step."""
        self._step = 0
        self._layers = LayerPolicy(self._alarms or (), self._fallback)
        self._watch = StepWatch(self._spikes)
        self._recovery = Recovery(self.rewind or RewindRule())
        self._snapshots = Snapshots(None)
        self._resumed_snapshots: list[str] = []
        self._log = EventLog()

    @property
    def events(self) -> tuple[Event, ...]:
        """What was seen and done so far, over all parts of a run that was resumed."""
        return tuple(self._log.events)

    @property
    def fallen_back(self) -> frozenset[str]:
        """The layers that now compute in BF16."""
        return self._layers.fallen

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts anew and finds the monitor.

        Raises:
            ValueError: There is none, or it comes later.
        """
        if stage != "fit":
            return
        if not trainer.global_step:  # what a checkpoint holds is loaded later
            self._begin()
        if self._alarms is not None and not self._alarms:
            return
        callbacks: list[Any] = cast(Any, trainer).callbacks
        monitors = [c for c in callbacks[: callbacks.index(self)] if isinstance(c, FP8Monitor)]
        if not monitors:
            raise ValueError(
                "FP8Guard acts on what FP8Monitor reads: list an FP8Monitor before it in trainer.callbacks, or give"
                " FP8Guard alarms=[] to look at gradients and the loss alone."
            )
        for monitor in monitors:
            if self.on_reading not in monitor.listeners:
                monitor.listeners.append(self.on_reading)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes up what a checkpoint says: layers in BF16, snapshots, events."""
        if self._alarms is None:
            rounded = any(_rounds_to_nearest(optimizer) for optimizer in trainer.optimizers)
            self._layers.alarms = (*DEFAULT_ALARMS, *([STALLED] if rounded else []))
        if self.skip_nonfinite:
            self._watch.attach(trainer.optimizers)
        if not self._step:  # a new run, or one that had no guard until now
            self._watch.pass_over(trainer.global_step)
        self._step = trainer.global_step
        fall_back(pl_module, self._layers.fallen)
        folder = Path(trainer.default_root_dir)
        on_disk = self.rewind is not None and self.rewind.on_disk
        self._snapshots = Snapshots(folder / SNAPSHOTS if on_disk else None, trainer.global_rank)
        if not _all(self._snapshots.adopt(self._resumed_snapshots)):
            self._snapshots.adopt([])
        if trainer.is_global_zero and not cast(Any, trainer).fast_dev_run:
            self._log.open(folder / EVENTS)

    def on_reading(self, trainer: Trainer, reading: Reading) -> None:
        """Acts on a reading of the monitor, which calls it on all ranks."""
        decisions = self._layers.decide(reading)
        for decision in decisions:
            self._log.add(event_of(reading.step, decision))
        if any(decision.action != "warn" for decision in decisions):
            fall_back(trainer.lightning_module, self._layers.fallen)
        if decisions:
            say(trainer, reading.step, summary(decisions), self._log)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Leaves the step out if its gradients are not finite, for optimizers that do not."""
        self._watch.before_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the loss; when it is due, looks at the losses, takes a snapshot, leaves out data."""
        stepped = trainer.global_step > self._step
        self._watch.add(_loss(outputs), ends_step=stepped)
        if not stepped:
            return
        self._step = trainer.global_step
        first = self.rewind is not None and not len(self._snapshots)
        due = self._step % self.check_every == 0 or self._step == trainer.max_steps or first
        # What lies before a gap in the data is looked at before the gap.
        due |= self._recovery.left_out(self._watch.data_step) > 0
        went_back = due and self._check(trainer, pl_module)
        wanted = self.rewind is not None and self._step % self.rewind.snapshot_every == 0 and not self._watch.in_doubt
        if (first or wanted) and not went_back:
            state = {"step": self._step, "trainer": take(trainer, pl_module, self), "path": self._watch.path()}
            self._snapshots.add(f"step-{self._step}-{self._recovery.rewinds}", state)
        if steps := self._recovery.left_out(self._watch.data_step):
            leave_out(trainer, steps)
            self._watch.pass_over(steps)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Deletes the snapshots."""
        self._snapshots.clear()

    def state_dict(self) -> dict[str, Any]:
        """All that decisions depend on, as plain numbers and strings; reads the losses, on all ranks."""
        return {
            "step": self._step,
            "watch": self._watch.state_dict(),
            "layers": self._layers.state_dict(),
            "recovery": self._recovery.state_dict(),
            "snapshots": self._snapshots.pin(),
            "events": self._log.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned; `on_train_start` applies it."""
        self._step = state_dict["step"]
        self._watch.load_state_dict(state_dict["watch"])
        self._layers.load_state_dict(state_dict["layers"])
        self._recovery.load_state_dict(state_dict["recovery"])
        self._resumed_snapshots = list(state_dict["snapshots"])
        self._log.load_state_dict(state_dict["events"])

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Looks at what there was since the last check; returns whether training went back."""
        skipped, spike = self._watch.look()
        if skipped:
            message = f"the gradients of {skipped} steps were not finite, and these steps were left out."
            self._report(trainer, Event(self._step, "nonfinite", "skip", message, metric="steps", figure=skipped))
        if spike is None:
            return False
        limit = self._spikes.kappa if self._spikes else None
        event = Event(self._step, "spike", "warn", "", metric="loss z", figure=finite(spike.z), limit=limit)
        seen = f"the loss was {spike.loss:.4g}, {spike.z:.3g} robust deviations above the median, and not alone."
        if self.rewind is None:
            message = f"{seen} To go back in such a case, give FP8Guard a rewind rule."
            self._report(trainer, replace(event, message=message))
            return False
        try:
            # What was taken since then is of the spike as well.
            start, stop = self._recovery.plan(spike._replace(now=self._watch.data_step - 1))
        except LossSpikeError as error:
            self._report(trainer, replace(event, action="give up", message=str(error)))
            raise
        with_data = self._go_back(trainer, pl_module)
        message = (
            f"{seen} Training goes back to step {self._step} and leaves out steps {start} to {stop - 1} of the data."
        )
        if not with_data:
            message += " The data loader has no state to go back to: all that it gave since is left out."
        self._report(trainer, replace(event, action="rewind", message=message))
        return True

    def _go_back(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """To the older snapshot; events, plans and what was learnt of layers stay. Returns whether the data went."""
        snapshot = self._snapshots.back_to_oldest()
        with_data = put_back(trainer, pl_module, snapshot["trainer"], self)
        self._step = snapshot["step"]
        self._watch.go_back(snapshot["path"], with_data=with_data)
        if self.skip_nonfinite:
            self._watch.attach(trainer.optimizers)
        for logger in trainer.loggers:
            if isinstance(logger, RunLog):
                logger.start_at(self._step)
        return with_data

    def _report(self, trainer: Trainer, event: Event) -> None:
        self._log.add(event)
        say(trainer, event.step, [event.message], self._log)


def _loss(outputs: Any) -> Tensor | None:
    """The loss in what a training step returned."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _rounds_to_nearest(optimizer: Optimizer) -> bool:
    """Whether it keeps weights of less than 32 bits and loses what is less than half of their last."""
    groups = [group for group in optimizer.param_groups if group.get("rounding", "nearest") == "nearest"]
    return any(isinstance(p, nn.Parameter) and p.dtype is not torch.float32 for g in groups for p in g["params"])


def _all(flag: bool) -> bool:
    """Whether all processes say so."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag
    flags = [False] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(flags, flag)
    return all(flags)
