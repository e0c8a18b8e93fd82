"""Whether the loss has left its path: one outlier is a batch, several in a row are a spike.

    z = (loss - median) / (1.4826 * MAD + floor)

over the losses of the last `window` steps, MAD being their median absolute deviation; 1.4826 MAD is a Gaussian's
standard deviation. Median and MAD do not notice the spike that they are to measure, which mean and deviation would.
`consecutive` losses in a row with z > `kappa`, or not finite, are a spike, and the first of them is its onset. While
the loss falls the median lies above it and z below 0, so a detector of jumps upwards needs no trend to be taken out.

The base rate decides what may follow. PaLM met about 20 spikes in 250,000 steps: a detector that is wrong once in a
thousand steps is wrong 14 times out of 15. Two and more in a row at 6 deviations are not met by chance.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple


@dataclass(frozen=True)
class SpikeRule:
    """What counts as a spike.

    Attributes:
        window: Losses that are compared with.
        kappa: Robust deviations above the median.
        consecutive: So many in a row.
        floor: Nats added to the deviation: on data that is learnt by heart, noise of a thousandth is no spike.
        arm_after: Losses seen before any counts.
    """

    window: int = 50
    kappa: float = 6.0
    consecutive: int = 2
    floor: float = 0.01
    arm_after: int = 30

    def __post_init__(self) -> None:
        if not 2 <= self.arm_after <= self.window or self.kappa <= 0 or self.consecutive < 1 or self.floor <= 0:
            raise ValueError(
                f"{self}: arm_after must be from 2 to `window`, consecutive at least 1, kappa and floor more than 0."
            )


class Spike(NamedTuple):
    """A confirmed spike.

    Attributes:
        onset: Index of the first loss of it.
        now: Index of the loss that confirmed it.
        loss: That loss.
        z: Its deviation; infinite if it is not finite.
    """

    onset: int
    now: int
    loss: float
    z: float


def robust_z(loss: float, window: Sequence[float], floor: float) -> float:
    """How many robust deviations `loss` lies above the median of `window`; infinite if it is not finite."""
    if not math.isfinite(loss):
        return math.inf
    middle = median(window)
    return (loss - middle) / (1.4826 * median(abs(other - middle) for other in window) + floor)


class SpikeDetector:
    """Sees the loss of each step, in order, and says when a spike is confirmed: once for each.

    Losses that stand out do not enter the window. Plain Python numbers; the same losses lead to the same answer, on
    every rank and after a resume.
    """

    def __init__(self, rule: SpikeRule) -> None:
        self.rule = rule
        self._window: list[float] = []
        self._run: list[int] = []  # indices of the losses in a row that stand out

    @property
    def in_doubt(self) -> bool:
        """Whether the newest loss stands out: no moment to keep what is there."""
        return bool(self._run)

    def see(self, index: int, loss: float) -> Spike | None:
        """Takes the loss of step `index`."""
        rule = self.rule
        armed = len(self._window) >= rule.arm_after
        z = robust_z(loss, self._window, rule.floor) if armed or not math.isfinite(loss) else 0.0
        if z <= rule.kappa:
            self._run = []
            self._window = [*self._window, loss][-rule.window :]
            return None
        self._run.append(index)
        if len(self._run) != rule.consecutive:
            return None
        return Spike(self._run[0], index, loss, z)

    def state_dict(self) -> dict[str, Any]:
        """The window and the losses that stand out, as plain numbers."""
        return {"window": list(self._window), "run": list(self._run)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self._window, self._run = list(state["window"]), list(state["run"])
