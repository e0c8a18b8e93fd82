"""The monitor's buffer: the figures of the metrics it stands for, merged over ranks in one call."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_fp8.callbacks.watch.linears import OF_CASTS
from lightning_fp8.callbacks.watch.tally import Gauge, Place, Tally
from lightning_fp8.metrics import ActivationKurtosis, Amax, MaxMedianRatio
from lightning_fp8.metrics.rounded import Rounded
from lightning_fp8.numerics import E4M3, quantize
from tests.ranks import spawn

WIDTHS = {"a": 32, "b": 48, "never": 32}
PLACES = {
    Place(layer, role): {
        "amax": Gauge.of(Amax),
        **{name: Gauge.of(kind) for name, kind in OF_CASTS.items()},
        **({"kurtosis": Gauge.of(ActivationKurtosis, width)} if role == "input" else {}),
        "ratio": Gauge.of(MaxMedianRatio),
    }
    for layer, width in WIDTHS.items()
    for role in ("input", "weight")
}


def batch(place, seed):
    generator = torch.Generator().manual_seed(seed + 10 * list(PLACES).index(place))
    size = torch.rand(1, generator=generator) * 2.0 ** (-16 * torch.rand(40, WIDTHS[place.layer], generator=generator))
    return torch.randn(40, WIDTHS[place.layer], generator=generator) * size


def measured(place, x):
    gauges, rounded = PLACES[place], Rounded.of(x, quantize(x, E4M3))
    return {name: gauge.metric.measure(rounded if name in OF_CASTS else x) for name, gauge in gauges.items()}


def expected(place, seeds):
    """By the metrics themselves."""
    found = {}
    for name, gauge in PLACES[place].items():
        metric = gauge.metric(gauge.size)
        metric.sync_on_compute = False
        for seed in seeds:
            x = batch(place, seed)
            metric.update(*((x, quantize(x, E4M3)) if name in OF_CASTS else (x,)))
        found[name] = float(metric.compute())
    return found


def used():
    return [place for place in PLACES if place.layer != "never"]


def test_figures_are_those_of_the_metrics_and_reading_starts_anew():
    tally = Tally(PLACES, torch.device("cpu"))
    for seeds in ([0, 1], [2, 3, 4]):
        for seed in seeds:
            for place in used():
                tally.add(place, measured(place, batch(place, seed)))
        read = tally.read()
        assert {(layer, role) for layer, roles in read.items() for role in roles} == set(used())
        for place in used():
            assert read[place.layer][place.role] == pytest.approx(expected(place, seeds), rel=1e-9, nan_ok=True)
    assert tally.read() == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_layer_spoils_no_other(bad):
    tally, (first, second) = Tally(PLACES, torch.device("cpu")), used()[:2]
    tally.add(first, measured(first, torch.full((4, 32), bad)))
    tally.add(second, measured(second, batch(second, 0)))
    read = tally.read()
    assert str(read[first.layer][first.role]["amax"]) == str(bad)
    assert read[second.layer][second.role] == pytest.approx(expected(second, [0]), rel=1e-9)
    tally.add(first, measured(first, batch(first, 0)))
    assert tally.read()[first.layer][first.role] == pytest.approx(expected(first, [0]), rel=1e-9)


def test_adding_reads_nothing_back():
    """Tensors without values, which claim to be on a GPU: whatever the host had to know would be an error."""
    with FakeTensorMode():
        tally, place = Tally(PLACES, torch.device("cuda")), used()[0]
        x = torch.randn(40, 32, device="cuda")
        tally.add(place, measured(place, x))


def _on_two_ranks(folder: Path) -> None:
    rank, calls = dist.get_rank(), []
    reduce = dist.all_reduce
    dist.all_reduce = lambda *args, **options: calls.append(1) or reduce(*args, **options)
    tally, (first, *others) = Tally(PLACES, torch.device("cpu")), used()
    for seed in [0, 1, 2] if rank == 0 else [3]:
        for place in others:
            tally.add(place, measured(place, batch(place, seed)))
    if rank == 1:  # what one rank alone has seen
        tally.add(first, measured(first, batch(first, 5)))
    read = tally.read()
    assert len(calls) == 1
    assert read[first.layer][first.role] == pytest.approx(expected(first, [5]), rel=1e-9)
    for place in others:
        assert read[place.layer][place.role] == pytest.approx(expected(place, range(4)), rel=1e-9)
    both = [None, None]
    dist.all_gather_object(both, read)
    assert both[0] == both[1]
    assert tally.read() == {}


def test_two_ranks_read_the_same_in_one_call(tmp_path):
    spawn(_on_two_ranks, 2, tmp_path)
