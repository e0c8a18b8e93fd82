"""What a guard remembers and forgets: after going back, across a kill, and while it is in doubt."""

import pytest
import torch
from guarded import guard, run

from lightning_fp8.callbacks.guard import SpikeRule
from lightning_fp8.callbacks.guard.snapshots import Snapshots
from lightning_fp8.callbacks.guard.spikes import Spike
from lightning_fp8.callbacks.guard.watch import StepWatch

RULE = SpikeRule(window=8, arm_after=3, consecutive=2)


def watched(watch, losses):
    for loss in losses:
        watch.add(torch.tensor(loss), ends_step=True)
    return watch.look()


def test_going_back_forgets_the_losses_of_the_spike():
    """Or they would pass for usual, and the spike that comes again would not be one."""
    watch = StepWatch(RULE)
    usual = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0]
    assert watched(watch, usual).spike is None
    path = watch.path()
    assert watched(watch, [9.0] * 8).spike is not None
    assert watched(watch, [9.0, 9.1, 8.9]).spike is None  # by now
    watch.go_back(path, with_data=True)
    assert watch.path() == path
    assert watched(watch, [9.0, 9.0]).spike is not None


def test_what_is_to_be_left_out_is_in_the_checkpoint():
    killed, resumed = guard(), guard()
    killed._recovery.plan(Spike(onset=5, now=7, loss=9.0, z=80.0))
    resumed.load_state_dict(killed.state_dict())
    assert [resumed._recovery.left_out(step) for step in range(4, 9)] == [0, 3, 2, 1, 0]
    # Another one in this place is the second, which is cut twice as wide.
    assert resumed._recovery.plan(Spike(onset=8, now=9, loss=9.0, z=80.0)) == (8, 12)


@pytest.mark.parametrize("doubtful", [False, True])
def test_no_snapshot_is_taken_in_doubt(prepared, tmp_path, monkeypatch, doubtful):
    taken = []
    add = Snapshots.add
    monkeypatch.setattr(Snapshots, "add", lambda own, name, state: taken.append(state["step"]) or add(own, name, state))
    monkeypatch.setattr(StepWatch, "in_doubt", doubtful)
    run(tmp_path, prepared, guard())
    assert taken == ([1] if doubtful else [1, 6, 12, 18, 24])
