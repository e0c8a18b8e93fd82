"""The pure parts of a guard: rules, state machines, plans and logs, with made-up figures."""

import json
import math
import random
from statistics import median

import pytest
import torch

from lightning_fp8.callbacks.guard import (
    DEFAULT_ALARMS,
    Alarm,
    FallbackRule,
    LayerPolicy,
    LossSpikeError,
    Recovery,
    RewindRule,
    Spike,
    SpikeDetector,
    SpikeRule,
)
from lightning_fp8.callbacks.guard.alarms import raised
from lightning_fp8.callbacks.guard.events import Event, EventLog
from lightning_fp8.callbacks.guard.losses import WaitingLosses
from lightning_fp8.callbacks.guard.snapshots import Snapshots
from lightning_fp8.callbacks.guard.watch import StepWatch
from lightning_fp8.callbacks.readings import Figure, Reading

UNDERFLOW = Alarm("underflow", 0.3, ("input",), action="fallback")


def reading(step, value, layer="mlp", metric="underflow", role="input"):
    return Reading(step, {layer: {role: {metric: value}}, "other": {"input": {"underflow": 0.0}}})


@pytest.mark.parametrize(
    ("alarm", "value", "is_raised"),
    [
        (Alarm("x", 1.0), 1.0, False),
        (Alarm("x", 1.0), 1.1, True),
        (Alarm("x", 1.0), math.inf, True),
        (Alarm("x", 1.0), math.nan, False),
        (Alarm("x", 1.0, below=True), 0.9, True),
        (Alarm("x", 1.0, below=True), 1.0, False),
        (Alarm("x", 1.0, below=True), math.inf, False),
        (Alarm("x", math.inf), 1e300, False),
        (Alarm("x", math.inf), math.inf, True),
        (Alarm("x", math.inf), math.nan, True),
    ],
)
def test_an_alarm_is_raised_on_its_side_of_the_limit(alarm, value, is_raised):
    figure = Figure("layer", "input", "x", value)
    assert bool(raised([figure], [alarm])) is is_raised
    assert not raised([figure._replace(metric="y")], [alarm])
    assert not raised([figure], [Alarm("x", alarm.limit, ("weight",), below=alarm.below)])


def test_default_alarms_warn_before_they_act_and_say_why():
    for alarm in DEFAULT_ALARMS:
        assert alarm.advice
        if alarm.action == "fallback" and math.isfinite(alarm.limit):
            warnings = [a for a in DEFAULT_ALARMS if (a.metric, a.roles) == (alarm.metric, alarm.roles)]
            assert min(a.limit for a in warnings if a.action == "warn") < alarm.limit
    with pytest.raises(ValueError, match="warn, fallback"):
        Alarm("x", 1.0, action="stop")


def actions(policy, values):
    """What is decided at each of a series of samples, in letters."""
    return "".join(
        {"": ".", "warn": "w", "fallback": "F", "warn fallback": "B", "return": "R"}[
            " ".join(decision.action for decision in policy.decide(reading(i, value)))
        ]
        for i, value in enumerate(values)
    )


def test_a_layer_falls_back_after_two_of_three_and_returns_after_ten_calm_samples():
    policy = LayerPolicy([UNDERFLOW], FallbackRule())
    bad, good = 0.5, 0.1
    assert actions(policy, [bad, good, good, bad, good, good]) == "w....."  # one of three each time, and told once
    assert actions(policy, [bad, good, bad]) == "..F"
    assert policy.fallen == {"mlp"}
    assert actions(policy, [good] * 9 + [bad] + [good] * 9) == "." * 19
    assert actions(policy, [good]) == "R"
    assert policy.fallen == frozenset()
    assert actions(policy, [good, bad]) == ".w"  # calm for long enough to be told again


def test_a_layer_that_keeps_falling_stays_in_bf16():
    policy = LayerPolicy([UNDERFLOW], FallbackRule(max_fallbacks=2))
    cycle = [0.5, 0.5, *[0.0] * 10]
    assert actions(policy, cycle) == "wF" + "." * 9 + "R"
    assert actions(policy, cycle) == "wF" + "." * 10
    assert actions(policy, [0.0] * 50) == "." * 50
    assert policy.fallen == {"mlp"}
    never = LayerPolicy([UNDERFLOW], FallbackRule(max_fallbacks=0))
    assert actions(never, [0.5] * 9) == "w" + "." * 8


def test_a_layer_without_figures_stays_as_it_is():
    policy = LayerPolicy([UNDERFLOW], FallbackRule())
    actions(policy, [0.5, 0.5])
    for step in range(30):
        assert policy.decide(Reading(step, {"other": {"input": {"underflow": 0.0}}})) == []
    assert policy.fallen == {"mlp"}


def test_each_reason_is_told_once():
    alarms = [Alarm("underflow", 0.05), UNDERFLOW, Alarm("sqnr", 25.0, below=True)]
    policy = LayerPolicy(alarms, FallbackRule())
    both = Reading(0, {"mlp": {"input": {"underflow": 0.5, "sqnr": 20.0}}})
    assert [str(d.cause.figure.metric) for d in policy.decide(both)] == ["underflow", "underflow", "sqnr"]
    assert [d.action for d in policy.decide(both)] == ["fallback"]
    assert policy.decide(both) == []


def test_a_policy_resumes_where_it_was():
    generator = random.Random(1)
    values = [generator.choice([0.0, 0.0, 0.5]) for _ in range(300)]
    whole, first, second = (LayerPolicy([UNDERFLOW], FallbackRule(calm=3, max_fallbacks=9)) for _ in range(3))
    expected = actions(whole, values)
    assert {"F", "R"} <= set(expected)
    for cut in range(1, 60):
        first.load_state_dict({})
        head = actions(first, values[:cut])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert head + actions(second, values[cut:]) == expected


@pytest.mark.parametrize("rule", [{"enter": 4}, {"enter": 0}, {"calm": 0}, {"max_fallbacks": -1}])
def test_fallback_rules_out_of_range_are_refused(rule):
    with pytest.raises(ValueError, match="enter must be"):
        FallbackRule(**rule)


RULE = SpikeRule(window=20, arm_after=5, consecutive=2, kappa=6.0, floor=0.01)


def test_a_spike_is_confirmed_by_the_second_loss_that_stands_out():
    detector = SpikeDetector(RULE)
    losses = [3.0 + 0.01 * (i % 3) for i in range(20)]
    assert not any(detector.see(i, loss) for i, loss in enumerate(losses))
    assert detector.see(20, 9.0) is None
    assert detector.in_doubt
    assert detector.see(21, 3.0) is None  # one bad batch
    assert not detector.in_doubt
    assert detector.see(22, 9.0) is None
    spike = detector.see(23, 8.0)
    window = [*losses[1:], 3.0]
    middle = median(window)
    mad = median(abs(loss - middle) for loss in window)
    assert spike == Spike(22, 23, 8.0, pytest.approx((8.0 - middle) / (1.4826 * mad + 0.01)))
    assert detector.see(24, 8.0) is None  # told once


def test_losses_that_are_not_finite_stand_out_whenever_they_come():
    detector = SpikeDetector(RULE)
    assert detector.see(0, math.nan) is None
    assert detector.see(1, math.inf) == Spike(0, 1, math.inf, math.inf)


def test_clean_losses_raise_no_spike():
    """Falling losses with noise, 100 runs of 1,000 steps with deviations from 0.01 to 0.3 nats."""
    for seed in range(100):
        generator = random.Random(seed)
        sd = 10 ** generator.uniform(-2, -0.5)
        detector = SpikeDetector(SpikeRule())
        for step in range(1000):
            loss = 3 + 5 * math.exp(-step / 60) + generator.gauss(0, sd)
            assert detector.see(step, loss) is None, (seed, step)


@pytest.mark.parametrize("rule", [{"arm_after": 1}, {"arm_after": 51}, {"kappa": 0}, {"consecutive": 0}, {"floor": 0}])
def test_spike_rules_out_of_range_are_refused(rule):
    with pytest.raises(ValueError, match="arm_after must be"):
        SpikeRule(**rule)


def test_cuts_widen_in_one_place_and_end():
    recovery = Recovery(RewindRule(snapshot_every=10, margin=2, max_rewinds=3))
    assert recovery.plan(Spike(50, 52, 9.0, 9.0)) == (48, 53)
    assert [recovery.left_out(i) for i in (47, 48, 52, 53)] == [0, 5, 1, 0]
    assert recovery.plan(Spike(53, 54, 9.0, 9.0)) == (51, 59)
    assert recovery.left_out(48) == 11
    assert recovery.plan(Spike(60, 61, 9.0, 9.0)) == (58, 74)
    copied = Recovery(recovery.rule)
    copied.load_state_dict(json.loads(json.dumps(recovery.state_dict())))
    for each in (recovery, copied):
        with pytest.raises(LossSpikeError, match="3 times"):
            each.plan(Spike(80, 81, 9.0, 9.0))
        assert each.left_out(58) == 16
    elsewhere = Recovery(RewindRule(snapshot_every=10, max_rewinds=1))
    for onset in (50, 90, 130):
        assert elsewhere.plan(Spike(onset, onset + 1, 9.0, 9.0)) == (onset - 2, onset + 2)
    assert elsewhere.rewinds == 3


def test_events_are_lines_and_a_resume_drops_those_of_a_run_that_died(tmp_path):
    file = tmp_path / "run" / "events.jsonl"
    log = EventLog()
    log.open(file)
    assert not file.exists()
    log.add(Event(3, "metric", "warn", "x", "layer", "input underflow", 0.4, 0.3))
    saved = log.state_dict()
    log.add(Event(5, "spike", "rewind", "y"))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 5]
    assert set(lines[0]) == {"step", "kind", "layer", "metric", "figure", "limit", "action", "message"}
    resumed = EventLog()
    resumed.load_state_dict(saved)
    resumed.open(file)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [3]
    assert resumed.counts() == {"warn": 1}


def test_losses_of_micro_batches_are_added_and_read_once():
    losses = WaitingLosses()
    for i in range(5):
        losses.add(torch.tensor(float(i)), ends_step=i % 2 == 1)
    assert losses.read(torch.tensor(7)) == [7.0]
    assert losses.take() == [1.0, 5.0]  # the last belongs to a step that has not ended
    losses.add(torch.tensor(10.0), ends_step=True)
    state = losses.state_dict()
    assert state == [14.0]
    other = WaitingLosses()
    other.load_state_dict(state)
    assert other.take() == losses.take() == [14.0]
    assert losses.take() == []


def test_a_plain_loop_watches_its_steps():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], lr=0.1)
    watch = StepWatch(SpikeRule(window=8, arm_after=4))
    watch.attach([optimizer])
    found = []
    for step in range(1, 21):
        p.grad = torch.full((3,), math.nan if step == 7 else 0.01)
        watch.before_step(optimizer)
        optimizer.step()
        watch.add(torch.tensor(9.0 if step in (13, 14) else 3.0), ends_step=True)
        if step % 5 == 0:
            found.append(watch.look())
            watch.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert [seen.skipped for seen in found] == [0, 1, 0, 0]
    assert [seen.spike and seen.spike[:2] for seen in found] == [None, None, (12, 13), None]
    assert watch.state_dict()["next"] == watch.data_step == 20
    assert p.isfinite().all()


@pytest.mark.parametrize("on_disk", [True, False])
def test_snapshots_keep_two_and_share_nothing(tmp_path, on_disk):
    snapshots = Snapshots(tmp_path if on_disk else None)
    live = {"w": torch.zeros(3), "list": [torch.ones(1)], "number": 1}
    for step in range(4):
        live["w"].fill_(step)
        snapshots.add(f"s{step}", live)
    live["w"].fill_(-1)
    for _ in range(2):
        back = snapshots.back_to_oldest()
        assert back["w"].tolist() == [2.0, 2.0, 2.0]
        back["w"].fill_(9)
        back["list"][0].fill_(9)
    assert len(snapshots) == 1
    snapshots.clear()
    assert not list(tmp_path.iterdir())


def test_snapshots_that_a_checkpoint_names_stay_until_the_next(tmp_path):
    snapshots = Snapshots(tmp_path)
    for name in "ab":
        snapshots.add(name, {})
    named = snapshots.pin()
    for name in "cde":
        snapshots.add(name, {})
    assert sorted(file.name[0] for file in tmp_path.iterdir()) == ["a", "b", "d", "e"]
    resumed = Snapshots(tmp_path)
    assert resumed.adopt(named)
    resumed.add("f", {})
    assert sorted(file.name[0] for file in tmp_path.iterdir()) == ["a", "b", "f"]
    assert not Snapshots(None).adopt(named)
    assert not Snapshots(tmp_path).adopt(["c"])
