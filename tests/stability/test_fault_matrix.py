"""The fault matrix: each fault breaks a run, is seen in time, and is cured.

Three seeds, paired: broken, cured and clean runs start from the same weights and see the same data. A broken run ends
above the clean one of its seed by more than max(1 % of it, two standard deviations of the clean runs), a cured one does
not. Faults that are found when something is loaded are in `test_load_faults.py`.
"""

from statistics import stdev

import pytest
from faults import FAULTS, Fault
from trials import Run, Setup, run

SEEDS = (0, 1, 2)


def runs(setup: Setup) -> list[Run]:
    return [run(setup, seed) for seed in SEEDS]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_breaks_a_run_is_seen_in_time_and_is_cured(fault: Fault) -> None:
    clean, broken = runs(fault.clean), runs(fault.broken)
    spread = 2 * stdev(one.loss for one in clean)
    margins = [max(0.01 * one.loss, spread) for one in clean]
    gaps = [bad.loss - good.loss for bad, good in zip(broken, clean, strict=True)]
    first = [one.first(fault.detector) for one in broken]
    print(f"\n{fault.name}: clean {[round(r.loss, 4) for r in clean]}, margins {[round(m, 4) for m in margins]}")
    print(f"broken {[round(r.loss, 4) for r in broken]}, first alarms {first}")
    for step in first:
        assert step is not None
        assert fault.onset <= step < fault.onset + fault.within
    # NaN is outside of any margin.
    outside = [not gap <= margin for gap, margin in zip(gaps, margins, strict=True)]
    assert all(outside) or not fault.breaks_loss
    assert all(one.first(fault.detector) is None for one in clean)
    if fault.cured is None:
        return
    cured = runs(fault.cured)
    print(f"cured {[round(r.loss, 4) for r in cured]}")
    for good, mended, margin in zip(clean, cured, margins, strict=True):
        assert mended.loss - good.loss <= margin
        if not fault.alarms_when_cured:
            assert mended.first(fault.detector) is None
