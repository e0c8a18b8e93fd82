"""What is measured of the optimizer: what `FP8AdamW` has counted in its last step, layer by layer.

A layer's figures are of all its parameters together, under its name and the role "update"; they are there where groups
have `track_health`. What is merged, over the parameters of a layer and over ranks, are sums that are weighted by
elements, and maxima: so of sharded weights as well the root mean square is that of the whole layer. The two shares
are nearly so: of stalled updates the weight would be the number of weights to move, and of moments that of positive v,
which are all elements but for those whose update, or whose v, is exactly zero.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_fp8.callbacks.watch.tally import Gauge, Place, Tally
from lightning_fp8.metrics.moment_zeros import MomentZeroFraction
from lightning_fp8.metrics.stalled import StalledUpdateFraction
from lightning_fp8.metrics.update_size import MaxUpdate, UpdateRMS
from lightning_fp8.optim import FP8AdamW
from lightning_fp8.optim.groups import parameter_name
from lightning_fp8.optim.health import Health
from lightning_fp8.optim.shards import local_part

_GAUGES = {
    "update_rms": Gauge.of(UpdateRMS),
    "max_update": Gauge.of(MaxUpdate),
    "stalled_updates": Gauge.of(StalledUpdateFraction),
    "moment_zeros": Gauge.of(MomentZeroFraction),
}


def optimizer_places(optimizers: Sequence[Optimizer], module: nn.Module) -> Iterator[tuple[Place, dict[str, Gauge]]]:
    """What is measured of the optimizers that track their health; `module` has the names of layers."""
    for _, places in _tracked(optimizers, module):
        for place, _ in places.values():
            yield place, _GAUGES


@torch.no_grad()
def measure_optimizer(optimizers: Sequence[Optimizer], module: nn.Module, tally: Tally) -> None:
    """Adds the figures of the last step that was not skipped, if there was one."""
    for optimizer, places in _tracked(optimizers, module):
        for name, health in _last_step(optimizer).items():
            place, elements = places[name]
            v_at_floor, max_update, update_rms, updates_lost = (figure.double().to(tally.device) for figure in health)
            weight = torch.full_like(update_rms, elements)
            statistics = {
                "update_rms": torch.stack([weight * update_rms.square(), weight]),
                "max_update": max_update.view(1),
                "stalled_updates": torch.stack([weight * updates_lost, weight]),
                "moment_zeros": torch.stack([weight * v_at_floor, weight]),
            }
            tally.add(place, statistics)


def _last_step(optimizer: FP8AdamW) -> dict[str, Health]:
    try:
        return optimizer.health_by_parameter()
    except ValueError:  # every step so far was skipped
        return {}


def _tracked(
    optimizers: Sequence[Optimizer], module: nn.Module
) -> Iterator[tuple[FP8AdamW, dict[str, tuple[Place, int]]]]:
    """Each such optimizer, and by its own names of parameters, their places and elements on this rank."""
    names = {p: name.replace("_orig_mod.", "") for name, p in module.named_parameters()}
    for optimizer in optimizers:
        if isinstance(optimizer, FP8AdamW):
            places = {}
            for number, group in enumerate(optimizer.param_groups):
                for i, p in enumerate(group["params"] if group["track_health"] else ()):
                    key = parameter_name(group, number, i)
                    layer, _, own = names.get(p, key).rpartition(".")
                    places[key] = Place(layer or own, "update"), local_part(p).numel()
            if places:
                yield optimizer, places
