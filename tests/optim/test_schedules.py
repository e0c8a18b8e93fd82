import itertools
import math

import pytest
import torch

from lightning_fp8.optim import WarmupCosine, WarmupStableDecay

TOTAL = 100
COSINE = WarmupCosine(warmup_steps=10, final_ratio=0.1)
STABLE = WarmupStableDecay(warmup_steps=10, decay_steps=20, final_ratio=0.2)
MULTIPLIERS = [
    (COSINE, 0, 0.1),  # the first step is not lost on a learning rate of zero
    (COSINE, 4, 0.5),
    (COSINE, 9, 1.0),
    (COSINE, 10, 1.0),
    (COSINE, 10 + 89 / 2, 0.55),  # half the way from the peak to a tenth
    (COSINE, 10 + 89 / 3, 0.1 + 0.9 * 0.75),  # cos(pi / 3) = 1/2
    (COSINE, 99, 0.1),
    (COSINE, 150, 0.1),
    (WarmupCosine(warmup_steps=0), 0, 1.0),
    (STABLE, 0, 0.1),
    (STABLE, 9, 1.0),
    (STABLE, 50, 1.0),
    (STABLE, 79, 1.0),
    (STABLE, 80 + 19 / 2, 0.6),
    (STABLE, 99, 0.2),
    (STABLE, 150, 0.2),
    (WarmupStableDecay(warmup_steps=0, decay_steps=0), 99, 1.0),
    (WarmupStableDecay(warmup_steps=10, decay_steps=1), 98, 1.0),
    (WarmupStableDecay(warmup_steps=10, decay_steps=1), 99, 0.0),  # the last step has the final ratio however short
    (WarmupCosine(warmup_steps=99), 99, 0.1),
    (WarmupStableDecay(warmup_steps=95, decay_steps=50), 94, 1.0),  # a decay longer than what is left starts late
    (WarmupStableDecay(warmup_steps=95, decay_steps=50), 99, 0.0),
]


@pytest.mark.parametrize(("schedule", "step", "expected"), MULTIPLIERS)
def test_multiplier(schedule, step, expected):
    assert schedule.multiplier(step, TOTAL) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", [COSINE, STABLE])
def test_shape(schedule):
    values = [schedule.multiplier(step, TOTAL) for step in range(TOTAL)]
    rises = [b - a for a, b in itertools.pairwise(values)]
    assert all(rise > 0 for rise in rises[:9])
    assert all(rise <= 0 for rise in rises[9:])
    assert max(values) == 1.0
    assert max(map(abs, rises)) <= 0.1 + 1e-12  # a tenth a step, the warm-up's; there is no jump


def test_plateau_is_flat():
    assert {STABLE.multiplier(step, TOTAL) for step in range(9, TOTAL - STABLE.decay_steps)} == {1.0}


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (WarmupCosine, "warmup_steps"),
        (WarmupCosine, "final_ratio"),
        (WarmupStableDecay, "warmup_steps"),
        (WarmupStableDecay, "decay_steps"),
        (WarmupStableDecay, "final_ratio"),
    ],
)
def test_negative_fields_are_refused(kind, field):
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.{field} is -1; it must be 0 or more"):
        kind(**{field: -1})


def optimizer_of():
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (1.0, 0.5)]
    return torch.optim.SGD(groups)


def run(optimizer, scheduler, steps):
    """The learning rates of the next optimizer steps, by group."""
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", [COSINE, STABLE])
def test_every_group_follows(schedule):
    optimizer = optimizer_of()
    rates = run(optimizer, schedule.of(optimizer, TOTAL), TOTAL)
    expected = [schedule.multiplier(step, TOTAL) for step in range(TOTAL)]
    assert [rate for rate, _ in rates] == pytest.approx(expected, abs=1e-12)
    assert [rate for _, rate in rates] == pytest.approx([x / 2 for x in expected], abs=1e-12)


@pytest.mark.parametrize("schedule", [COSINE, STABLE])
def test_a_resumed_run_may_have_another_schedule_and_more_steps(schedule):
    optimizer = optimizer_of()
    scheduler = schedule.of(optimizer, TOTAL)
    run(optimizer, scheduler, 60)
    state = scheduler.state_dict()
    assert state["lr_lambdas"] == [None, None]  # no field of the schedule, so none is restored

    resumed = optimizer_of()
    resumed.load_state_dict(optimizer.state_dict())
    extended = schedule.of(resumed, 2 * TOTAL)
    extended.load_state_dict(state)
    run(resumed, extended, 1)  # the rate of step 60 was set before the checkpoint was written
    expected = [schedule.multiplier(step, 2 * TOTAL) for step in range(61, 2 * TOTAL)]
    assert [rate for rate, _ in run(resumed, extended, len(expected))] == pytest.approx(expected, abs=1e-12)
    assert math.isclose(resumed.param_groups[0]["lr"], expected[-1])
