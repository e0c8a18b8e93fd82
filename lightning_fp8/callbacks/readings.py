"""What `FP8Monitor` has read, in the form in which guards, tables and plots take it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Figure(NamedTuple):
    """One number of a reading."""

    layer: str
    role: str
    metric: str
    value: float


@dataclass(frozen=True)
class Reading:
    """The figures of one logging interval, equal on all ranks.

    Attributes:
        step: `trainer.global_step` at which it was read: the number of optimizer steps taken.
        values: Layer name -> role -> metric name -> figure. Roles are "input", "weight" and "grad_output" of a linear
            layer, "attention", "output" and "update" (what the optimizer does to a layer). What was not seen in the
            interval is not in it. A figure may be infinite (the SQNR of a cast without error) or, of non-finite
            tensors, NaN.
    """

    step: int
    values: dict[str, dict[str, dict[str, float]]]

    def figures(self) -> Iterator[Figure]:
        """All figures, in the order of the layers."""
        for layer, roles in self.values.items():
            for role, metrics in roles.items():
                for metric, value in metrics.items():
                    yield Figure(layer, role, metric, value)
