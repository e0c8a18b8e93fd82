"""The verdict on a fault, of losses and of steps of alarms alone: so it can be tried on outcomes that are made up.

A fault must break its runs: each ends above the clean run of its seed by more than max(1 % of it, two standard
deviations of the clean runs). The first alarm must come in time, clean runs must have none, and with the cure no run
may end outside. A loss that is lower than the clean one is no harm, and NaN is outside of any margin.

`mutants` are outcomes as they would be if the detector, the cure or the fault itself were not there. A table that does
not complain of each of them proves nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is claimed of a fault.

    Attributes:
        name: What goes wrong.
        onset: The first optimizer step with the fault, counted from 1; 0 is before any, when something is loaded.
        detector: The metric, or the kind of event, by which it is seen.
        within: The first alarm comes before step `onset + within`.
        cure: In words.
        test: The file that shows it, in `tests`.
        breaks_loss: Whether the broken run must end outside, or the fault may be told alone.
        alarms_when_cured: Whether the cure acts on the alarm, which then is raised in the cured run too.
    """

    name: str
    onset: int
    detector: str
    within: int
    cure: str
    test: str = "stability/test_fault_matrix.py"
    breaks_loss: bool = True
    alarms_when_cured: bool = False


class Outcome(NamedTuple):
    """What a run came to: its loss, and the step of the first alarm of the row's detector, if there was one."""

    loss: float
    alarm: int | None = None


class Found(NamedTuple):
    """The outcomes of a row, seed by seed; `cured` is empty where there is no cure."""

    clean: list[Outcome]
    broken: list[Outcome]
    cured: list[Outcome]


def margins(clean: Sequence[Outcome]) -> list[float]:
    """How far from the clean run of each seed another may end, nats."""
    spread = 2 * stdev(one.loss for one in clean)
    return [max(0.01 * one.loss, spread) for one in clean]


def complaints(row: Row, found: Found) -> list[str]:
    """What is not as the row claims."""
    said = []
    for seed, (good, bad, margin) in enumerate(zip(found.clean, found.broken, margins(found.clean), strict=True)):
        if row.breaks_loss and bad.loss - good.loss <= margin:
            said.append(f"seed {seed}: the broken run ends inside, {bad.loss - good.loss:+.4f} of {margin:.4f}")
        if bad.alarm is None or not row.onset <= bad.alarm < row.onset + row.within:
            said.append(f"seed {seed}: the first alarm is at {bad.alarm}")
        if good.alarm is not None:
            said.append(f"seed {seed}: the clean run has an alarm at {good.alarm}")
        for mended in found.cured[seed : seed + 1]:
            if not mended.loss - good.loss <= margin:
                said.append(f"seed {seed}: the cured run ends outside, {mended.loss - good.loss:+.4f} of {margin:.4f}")
            if mended.alarm is not None and not row.alarms_when_cured:
                said.append(f"seed {seed}: the cured run has an alarm at {mended.alarm}")
    return said


def mutants(row: Row, found: Found) -> Iterator[tuple[str, Found]]:
    """What the outcomes would be without a part of what they show; each with what is missing."""

    def with_alarm(runs: list[Outcome], alarm: int | None) -> list[Outcome]:
        return [run._replace(alarm=alarm) for run in runs]

    yield "the detector is off", found._replace(broken=with_alarm(found.broken, None))
    yield "the alarm is late", found._replace(broken=with_alarm(found.broken, row.onset + row.within))
    yield "the alarm is of something before", found._replace(broken=with_alarm(found.broken, row.onset - 1))
    yield "the alarm is always on", found._replace(clean=with_alarm(found.clean, row.onset))
    yield "the fault is not injected", found._replace(broken=found.clean)
    if row.breaks_loss:
        weak = [bad._replace(loss=good.loss) for good, bad in zip(found.clean, found.broken, strict=True)]
        yield "the fault is too weak", found._replace(broken=weak)
    if found.cured:
        yield "the cure is taken away", found._replace(cured=found.broken)
        yield "the cure is taken away from one seed", found._replace(cured=[*found.cured[:-1], found.broken[-1]])
        if not row.alarms_when_cured:
            yield "the cure leaves the alarm on", found._replace(cured=with_alarm(found.cured, row.onset))
