"""What a run came to, read from its folder; the run need not be one of ours."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_fp8.callbacks.page import Run, read_run
from lightning_fp8.callbacks.plots import series

TAIL = 10  # one in so many of the logged steps counts as the end of a run


@dataclass(frozen=True)
class Outcome:
    """Attributes are NaN or None where the run has no such figure.

    Attributes:
        run: All that is in the folder.
        loss: Of the validation after the last step, nats a token; of the last tenth of training where there was none.
        validated: Whether it is of a validation.
        first_loss: Of the first logged step: arms of one seed differ there by rounding alone.
        bits_per_byte: With that validation.
        tokens_per_second: Of training.
        bytes_per_param: Weights, gradients, moments.
        memory_gib: The most that tensors took of the device's memory.
        grad_norm: Median of the run, before clipping.
        update_ratio: Median of the run; at its end a rate that falls to zero leaves none.
        max_update: The largest |m / sqrt(v)| of the run, where the optimizer tracks it.
    """

    run: Run
    loss: float
    validated: bool
    first_loss: float
    bits_per_byte: float | None
    tokens_per_second: float
    bytes_per_param: dict[str, float]
    memory_gib: float | None
    grad_norm: float
    update_ratio: float
    max_update: float | None

    @property
    def total_bytes(self) -> float:
        """Of a parameter, together."""
        return sum(self.bytes_per_param.values()) if self.bytes_per_param else math.nan


def read_outcome(folder: Path) -> Outcome:
    """The figures of the run in `folder`.

    Raises:
        ValueError: It holds no run, or no loss.
    """
    run = read_run(folder)
    steps, train = series(run.rows, "train/loss")
    validated_at, val = series(run.rows, "val/loss")
    if not train and not val:
        raise ValueError(f"{folder} has no loss in its metrics.csv: is it a run of `lightning-fp8 fit`?")
    last = max(steps[-1:] + validated_at[-1:])
    validated = bool(val) and validated_at[-1] == last
    bits = series(run.rows, "val/bits_per_byte")[1]
    memory = series(run.rows, "memory_gib")[1]
    largest = [f.value for reading in run.readings for f in reading.figures() if f.metric == "max_update"]
    return Outcome(
        run=run,
        loss=val[-1] if validated else statistics.fmean(_tail(train)),
        validated=validated,
        first_loss=train[0] if train else math.nan,
        bits_per_byte=bits[-1] if validated and bits else None,
        tokens_per_second=run.summary.get("tokens_per_second", math.nan),
        bytes_per_param=run.summary.get("bytes_per_param", {}),
        memory_gib=max(memory) if memory else None,
        grad_norm=_typical(run, "grad_norm"),
        update_ratio=_typical(run, "update_ratio"),
        max_update=max(largest) if largest else None,
    )


def pairing(outcome: Outcome) -> dict[str, Any]:
    """What runs of a pair must share: the seed of the weights, all of the data, the steps; as `config.yaml` has it."""
    config = yaml.safe_load(outcome.run.config) or {}
    return {
        "seed_everything": config.get("seed_everything"),
        "data": config.get("data"),
        "trainer.max_steps": (config.get("trainer") or {}).get("max_steps"),
        "max_tokens": config.get("max_tokens"),
    }


def _typical(run: Run, name: str) -> float:
    values = series(run.rows, name)[1]
    return statistics.median(values) if values else math.nan


def _tail(values: list[float]) -> list[float]:
    return values[-max(1, len(values) // TAIL) :]
