"""Learning-rate schedules as plain numbers: a multiplier of the base learning rate for each optimizer step.

A schedule is a small frozen dataclass (so YAML can write it) with one method. It is turned into torch's `LambdaLR` by
`Schedule.of`, which torch steps once per optimizer step. The total number of steps is an argument of the method and
not a field: it belongs to the run, and a resumed run may extend it.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class Schedule(ABC):
    """A learning-rate schedule."""

    @abstractmethod
    def multiplier(self, step: int, total_steps: int) -> float:
        """What the base learning rate is multiplied by in optimizer step `step`, counted from 0."""

    def of(self, optimizer: Optimizer, total_steps: int) -> LambdaLR:
        """The torch scheduler that applies this schedule to every group of `optimizer`."""
        # A function and not a bound method: LambdaLR would store the attributes of a callable object in checkpoints.
        return LambdaLR(optimizer, lambda step: self.multiplier(step, total_steps))


@dataclass(frozen=True)
class WarmupCosine(Schedule):
    """Linear warm-up, then half a cosine down to a fraction of the peak.

    Attributes:
        warmup_steps: Optimizer steps until the peak is reached.
        final_ratio: What is left of the peak at the last step.
    """

    warmup_steps: int = 100
    final_ratio: float = 0.1

    def __post_init__(self) -> None:
        _check_not_negative(self, "warmup_steps", "final_ratio")

    def multiplier(self, step: int, total_steps: int) -> float:
        """See `Schedule.multiplier`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = _progress(step, self.warmup_steps, total_steps)
        return self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """Linear warm-up, a plateau, then a linear decay to a fraction of the peak.

    Attributes:
        warmup_steps: Optimizer steps until the peak is reached.
        decay_steps: Optimizer steps of the final decay.
        final_ratio: What is left of the peak at the last step.
    """

    warmup_steps: int = 100
    decay_steps: int = 100
    final_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check_not_negative(self, "warmup_steps", "decay_steps", "final_ratio")

    def multiplier(self, step: int, total_steps: int) -> float:
        """See `Schedule.multiplier`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        decay_start = max(self.warmup_steps, total_steps - self.decay_steps)
        if step < decay_start:
            return 1.0
        return 1.0 - (1.0 - self.final_ratio) * _progress(step, decay_start, total_steps)


def _progress(step: int, start: int, end: int) -> float:
    """How far `step` lies between `start` and the last step before `end`: 0 to 1, and 1 ever after."""
    steps = end - 1 - start
    return min(1.0, (step - start) / steps) if steps > 0 else 1.0


def _check_not_negative(schedule: Schedule, *names: str) -> None:
    for name in names:
        if getattr(schedule, name) < 0:
            raise ValueError(f"{type(schedule).__name__}.{name} is {getattr(schedule, name)}; it must be 0 or more.")
