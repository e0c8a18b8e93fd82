"""What is measured of the optimizer: the figures that `FP8AdamW.health()` has of its last step.

They are of all groups with `track_health` together, under the layer "optimizer" and the role "update". Over ranks,
shares and mean squares are averaged, which is exact where ranks hold the same or equal shards, and maxima are maxima.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_fp8.callbacks.watch.tally import Gauge, Place, Tally
from lightning_fp8.metrics.moment_zeros import MomentZeroFraction
from lightning_fp8.metrics.stalled import StalledUpdateFraction
from lightning_fp8.metrics.update_size import MaxUpdate, UpdateRMS
from lightning_fp8.optim import FP8AdamW

_GAUGES = {
    "update_rms": Gauge.of(UpdateRMS),
    "max_update": Gauge.of(MaxUpdate),
    "stalled_updates": Gauge.of(StalledUpdateFraction),
    "moment_zeros": Gauge.of(MomentZeroFraction),
}


def optimizer_places(optimizers: Sequence[Optimizer]) -> Iterator[tuple[Place, dict[str, Gauge]]]:
    """What is measured of the optimizers that track their health."""
    for place, _ in _tracked(optimizers):
        yield place, _GAUGES


@torch.no_grad()
def measure_optimizer(optimizers: Sequence[Optimizer], tally: Tally) -> None:
    """Adds the figures of the last step."""
    for place, optimizer in _tracked(optimizers):
        health = optimizer.health()
        one = torch.ones_like(health.update_rms)
        counts: dict[str, list[Any]] = {
            "update_rms": [health.update_rms.square(), one],
            "max_update": [health.max_update],
            "stalled_updates": [health.updates_lost, one],
            "moment_zeros": [health.v_at_floor, one],
        }
        device = tally.device
        tally.add(place, {name: torch.stack(figures).double().to(device) for name, figures in counts.items()})


def _tracked(optimizers: Sequence[Optimizer]) -> Iterator[tuple[Place, FP8AdamW]]:
    for number, optimizer in enumerate(optimizers):
        if isinstance(optimizer, FP8AdamW) and any(group["track_health"] for group in optimizer.param_groups):
            yield Place("optimizer" if number == 0 else f"optimizer.{number}", "update"), optimizer
