"""What to leave out of the data after a spike, how to widen it, and when to give up.

A step of data is what one optimizer step takes: its index counts all that were taken or left out, so it names the same
batches however often the run goes back. After a spike with onset o, confirmed at n, the steps of data from o - margin
to n are left out. A spike that comes again soon after that was cut too narrowly: the next cut is twice as wide, and the
one after four times. After `max_rewinds` in one place it is not the data, and going on would only hide it.

(PaLM, Chowdhery et al., went back about 100 steps and left out 200 to 500 batches, and did not meet the spike again.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_fp8.callbacks.guard.spikes import Spike


class LossSpikeError(RuntimeError):
    """The loss has spiked in one place of the data more often than going back may cure."""


@dataclass(frozen=True)
class RewindRule:
    """How to go back.

    Attributes:
        snapshot_every: Optimizer steps between snapshots; the older of the last two is gone back to.
        margin: Steps of data before the onset that are left out too.
        max_rewinds: For spikes in one place; the next one raises `LossSpikeError`.
        on_disk: Keep snapshots in the run's folder, where a resumed run finds them, instead of in memory. Either way
            each holds weights, optimizer state and buffers of this process: about 4 bytes a parameter for end-to-end
            FP8.
    """

    snapshot_every: int = 100
    margin: int = 2
    max_rewinds: int = 3
    on_disk: bool = True

    def __post_init__(self) -> None:
        if self.snapshot_every < 1 or self.margin < 0 or self.max_rewinds < 1:
            raise ValueError(f"{self}: snapshot_every and max_rewinds must be at least 1, margin 0 or more.")


class Recovery:
    """Remembers what is left out, and where the run has spiked."""

    def __init__(self, rule: RewindRule) -> None:
        self.rule = rule
        self.rewinds = 0
        self._in_place = 0  # rewinds that the last place has had
        self._cuts: list[tuple[int, int]] = []  # [start, stop) of steps of data

    def plan(self, spike: Spike) -> tuple[int, int]:
        """The steps of data [start, stop) to leave out because of `spike`, whose indices are such steps.

        Raises:
            LossSpikeError: It has been tried often enough.
        """
        near = bool(self._cuts) and spike.onset < self._cuts[-1][1] + 2 * self.rule.snapshot_every
        self._in_place = self._in_place + 1 if near else 1
        if self._in_place > self.rule.max_rewinds:
            raise LossSpikeError(
                f"FP8Guard: the loss spiked again (to {spike.loss:.4g}, {spike.z:.3g} deviations) after going back"
                f" {self.rule.max_rewinds} times and leaving out the data around it. It is not the data: lower the"
                " learning rate, clip gradients (ZClip, AdaGC), use qk_norm, or resume from an earlier checkpoint."
            )
        self.rewinds += 1
        start = max(0, spike.onset - self.rule.margin)
        stop = start + (spike.now + 1 - start) * 2 ** (self._in_place - 1)
        self._cuts.append((start, stop))
        return start, stop

    def left_out(self, index: int) -> int:
        """How many steps of data to leave out before the next, which would be the step of data `index`."""
        stop = index
        while found := [end for start, end in self._cuts if start <= stop < end]:
            stop = max(found)
        return stop - index

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, as plain numbers."""
        cuts = [list(cut) for cut in self._cuts]
        return {"rewinds": self.rewinds, "in_place": self._in_place, "cuts": cuts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self.rewinds, self._in_place = state["rewinds"], state["in_place"]
        self._cuts = [(start, stop) for start, stop in state["cuts"]]
