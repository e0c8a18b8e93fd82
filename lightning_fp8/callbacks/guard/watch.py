"""What is seen of every step: its loss, and whether its gradients were finite. No Trainer here.

    watch = StepWatch(SpikeRule()); watch.attach([optimizer])           # Fabric, or a plain loop
    for each step:
        ... backward ...; watch.before_step(optimizer); optimizer.step()
        watch.add(loss, ends_step=True)
        if step % 10 == 0: seen = watch.look()                          # one host read; the same on all ranks

A step of data is what one optimizer step takes. Their count goes on where data are left out, so that it names the same
batches however often a run goes back.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from lightning_fp8.callbacks.guard.losses import WaitingLosses
from lightning_fp8.callbacks.guard.nonfinite import StepSkipper
from lightning_fp8.callbacks.guard.spikes import Spike, SpikeDetector, SpikeRule


class Seen(NamedTuple):
    """What there was since the last look.

    Attributes:
        skipped: Steps left out for gradients that are not finite.
        spike: The first spike that was confirmed.
    """

    skipped: int
    spike: Spike | None


class StepWatch:
    """Watches steps.

    Args:
        spikes: What counts as a spike; None does not look at the loss.

    Attributes:
        data_step: Steps of data that were taken or left out: the index of the next.
    """

    def __init__(self, spikes: SpikeRule | None) -> None:
        self.data_step = 0
        self._detector = SpikeDetector(spikes) if spikes else None
        self._losses = WaitingLosses()
        self._next = 0  # index of the next loss to look at
        self._skippers: dict[Optimizer, StepSkipper] = {}
        self._counted = 0  # skipped steps, as the skippers count them
        self._unseen = 0  # of these

    @property
    def in_doubt(self) -> bool:
        """Whether the newest loss that was looked at stands out: no moment to keep what is there."""
        return self._detector is not None and self._detector.in_doubt

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Counts, and where need be skips, the steps of `optimizers`; again after their states were loaded.

        Raises:
            ValueError: One steps in backward, each parameter by itself.
        """
        self._skippers = {optimizer: StepSkipper(optimizer) for optimizer in optimizers}
        self._counted = 0

    def before_step(self, optimizer: Optimizer) -> None:
        """Leaves out the coming step if its gradients are not finite."""
        if optimizer in self._skippers:
            self._skippers[optimizer].before_step()

    def add(self, loss: Tensor | None, *, ends_step: bool) -> None:
        """Takes the loss of a micro-batch, a scalar on any device; None where there is none."""
        if loss is not None and self._detector is not None:
            self._losses.add(loss, ends_step=ends_step)
        self.data_step += ends_step

    def pass_over(self, steps: int) -> None:
        """Counts steps of data that were left out. All losses must have been looked at."""
        self.data_step += steps
        self._next = self.data_step

    def look(self) -> Seen:
        """Reads the device, once, and looks at what was not seen yet; on all ranks."""
        self._read()
        skipped, self._unseen = self._unseen, 0
        first: Spike | None = None
        for loss in self._losses.take():
            spike = self._detector.see(self._next, loss) if self._detector else None
            first = first or spike
            self._next += 1
        self._next = self.data_step
        return Seen(skipped, first)

    def _read(self) -> None:
        counts = [skipper.counts for skipper in self._skippers.values()]
        counted = int(sum(self._losses.read(*(count[0] for count in counts if count is not None))))
        self._unseen += counted - self._counted
        self._counted = counted

    def path(self) -> dict[str, Any]:
        """What goes back when a run does: where it is, and what losses are usual there. After a look."""
        return {"data_step": self.data_step, "detector": self._detector.state_dict() if self._detector else None}

    def go_back(self, path: Mapping[str, Any], *, with_data: bool) -> None:
        """To where `path` was returned; `with_data` says whether the data are there too."""
        self._losses.clear()
        self.data_step = path["data_step"] if with_data else self.data_step
        self._next = self.data_step
        if self._detector:
            self._detector.load_state_dict(path["detector"])

    def state_dict(self) -> dict[str, Any]:
        """All that is known, as plain numbers; reads the device, on all ranks."""
        self._read()
        return {"losses": self._losses.state_dict(), "next": self._next, "unseen": self._unseen, **self.path()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self._losses.load_state_dict(state["losses"])
        self._next, self._unseen, self.data_step = state["next"], state["unseen"], state["data_step"]
        if self._detector and state["detector"]:
            self._detector.load_state_dict(state["detector"])
