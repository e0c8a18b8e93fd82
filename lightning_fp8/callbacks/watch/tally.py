"""Statistics of hundreds of layers in one buffer: added up on the device, merged and read in one go.

Metrics are the classes of `lightning_fp8.metrics` that are a figure of merged statistics; here only their two
functions are used. Sums of all places lie in one fp64 buffer, maxima in another. To read them,

* one all-reduce merges both over ranks: it is a sum, and for maxima each rank has a slot of its own, which a sum with
  the zeros of the others leaves as it is;
* figures are taken of all places with the same metric at once;
* one copy to the host takes them all.

What a rank did not see adds nothing, so ranks need not see the same layers; they must read at the same steps.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fp8.metrics.merged import Merged


class Gauge(NamedTuple):
    """A metric at a place.

    Attributes:
        metric: Its class.
        size: How many statistics it has there.
    """

    metric: type[Merged]
    size: int

    @classmethod
    def of(cls, metric: type[Merged], size: int | None = None) -> "Gauge":
        """One of the metric's own size unless another is given."""
        return cls(metric, size or metric.size)


class Place(NamedTuple):
    """What is measured: an operand of a layer, say."""

    layer: str
    role: str


Values = dict[str, dict[str, dict[str, float]]]  # layer -> role -> metric -> figure


class Tally:
    """Adds up statistics of fixed places and reads them.

    Args:
        places: What is measured where; equal on all ranks, in the same order.
        device: Where the buffers are.
    """

    def __init__(self, places: Mapping[Place, Mapping[str, Gauge]], device: torch.device) -> None:
        self.places, self.device = dict(places), device
        cells = [(gauge, place, name) for place, gauges in places.items() for name, gauge in gauges.items()]
        # Places with the same metric side by side, so that their figures are taken at once.
        order = {gauge: i for i, gauge in enumerate(dict.fromkeys(gauge for gauge, _, _ in cells))}
        self._cells = sorted(cells, key=lambda cell: order[cell[0]])
        lengths = {"sum": 0, "max": 0}
        self._starts: dict[tuple[Place, str], int] = {}
        for gauge, place, name in self._cells:
            self._starts[place, name] = lengths[gauge.metric.reduction]
            lengths[gauge.metric.reduction] += gauge.size
        self._samples = torch.zeros(len(places), dtype=torch.float64, device=device)
        self._sums = torch.zeros(lengths["sum"], dtype=torch.float64, device=device)
        self._maxima = torch.full((lengths["max"],), -torch.inf, dtype=torch.float64, device=device)
        self._numbers = {place: number for number, place in enumerate(places)}

    def add(self, place: Place, statistics: Mapping[str, Tensor]) -> None:
        """Adds what was measured at a place: for each of its metrics, fp64 [size]."""
        gauges = self.places[place]
        for name, measured in statistics.items():
            start, (metric, size) = self._starts[place, name], gauges[name]
            if metric.reduction == "sum":
                self._sums[start : start + size] += measured
            else:
                cell = self._maxima[start : start + size]
                torch.maximum(cell, measured, out=cell)
        self._samples[self._numbers[place]] += 1

    def read(self) -> Values:
        """The figures of what was seen, by any rank, since the last reading; starts anew.

        A collective call where torch.distributed runs, with one all-reduce; one copy to the host.
        """
        samples, sums, maxima = _merged(self._samples, self._sums, self._maxima)
        figures = torch.cat([samples, *self._figures(sums, maxima)]).tolist()
        counts, values = figures[: len(self.places)], figures[len(self.places) :]
        by_cell = {(place, name): value for (_, place, name), value in zip(self._cells, values, strict=True)}
        read: Values = {}
        for (place, gauges), count in zip(self.places.items(), counts, strict=True):
            if count:
                read.setdefault(place.layer, {})[place.role] = {name: by_cell[place, name] for name in gauges}
        self._samples.zero_()
        self._sums.zero_()
        self._maxima.fill_(-torch.inf)
        return read

    def _figures(self, sums: Tensor, maxima: Tensor) -> Iterator[Tensor]:
        """The figures in the order of the cells."""
        at: dict[Any, int] = {"sum": 0, "max": 0}
        counts: dict[Gauge, int] = {}
        for gauge, _, _ in self._cells:
            counts[gauge] = counts.get(gauge, 0) + 1
        for gauge, count in counts.items():
            kind, length = gauge.metric.reduction, count * gauge.size
            statistics = (sums if kind == "sum" else maxima)[at[kind] : at[kind] + length]
            at[kind] += length
            yield gauge.metric.figure(statistics.view(count, gauge.size))


def _merged(samples: Tensor, sums: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same over all ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return samples, sums, maxima
    slots = maxima.new_zeros(dist.get_world_size(), len(maxima))
    slots[dist.get_rank()] = maxima
    packed = torch.cat([samples, sums, slots.flatten()])
    dist.all_reduce(packed)
    samples, sums, slots = packed.split([len(samples), len(sums), slots.numel()])
    return samples, sums, slots.view(dist.get_world_size(), -1).amax(0)
