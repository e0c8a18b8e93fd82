"""The fault matrix: each fault breaks a run, is seen in time, and is cured; `judge.py` says when that is so.

Three seeds, paired: broken, cured and clean runs start from the same weights and see the same data. The same runs with
the detector, the cure or the fault taken away must not pass. Faults that are no row of `faults.py` have tests of their
own; `matrix.py` has all twelve.
"""

import math
from dataclasses import replace

import pytest
from faults import FAULTS, Fault
from judge import Found, Outcome, complaints, margins, mutants
from trials import Run, Setup, run

from lightning_fp8.callbacks.guard import DEFAULT_ALARMS, Alarm, FallbackRule, LayerPolicy
from lightning_fp8.callbacks.guard.alarms import STALLED
from lightning_fp8.callbacks.guard.messages import event_of

SEEDS = (0, 1, 2)
EVENTS = ("nonfinite", "spike")  # detectors that are no figure of the monitor


def runs(setup: Setup | None) -> list[Run]:
    return [run(setup, seed) for seed in SEEDS] if setup else []


def without_limit(setup: Setup, detector: str) -> tuple[Alarm, ...]:
    """The alarms of a run, those on the detector's metric with an infinite limit."""
    alarms: tuple[Alarm, ...] = dict(setup.guard).get("alarms", (*DEFAULT_ALARMS, STALLED))
    metric = detector.split()[-1]
    return tuple(replace(one, limit=math.inf) if one.metric == metric else one for one in alarms)


def blind(setup: Setup, found: Run, detector: str) -> Run:
    """The run, had its guard had such alarms: they decide on the readings that the run had."""
    policy = LayerPolicy(without_limit(setup, detector), FallbackRule(max_fallbacks=0))
    events = [event_of(reading.step, made) for reading in found.readings for made in policy.decide(reading)]
    return found._replace(events=tuple(events))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_breaks_a_run_is_seen_in_time_and_is_cured(fault: Fault) -> None:
    def outcomes(found: list[Run]) -> list[Outcome]:
        return [Outcome(one.loss, one.first(fault.detector)) for one in found]

    clean, broken, cured = runs(fault.clean), runs(fault.broken), runs(fault.cured)
    found = Found(outcomes(clean), outcomes(broken), outcomes(cured))
    print(f"\n{fault.name}: margins {[round(margin, 4) for margin in margins(found.clean)]}")
    for name, one in found._asdict().items():
        print(f"{name} {[(round(loss, 4), alarm) for loss, alarm in one]}")
    assert complaints(fault, found) == []
    for missing, mutant in mutants(fault, found):
        assert complaints(fault, mutant), missing
    if fault.detector not in EVENTS:
        unseen = [blind(fault.broken, one, fault.detector) for one in broken]
        assert complaints(fault, found._replace(broken=outcomes(unseen)))
