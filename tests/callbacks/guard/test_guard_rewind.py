"""Going back after a loss spike: what comes after is what would have come without the bad batches, bit for bit."""

import json
import shutil

import pytest
from guarded import STEPS, batches_of, data_of, guard, run, trained
from lightning.pytorch.loggers.logger import DummyLogger
from test_precision_resume import differences

from lightning_fp8.callbacks.guard import LossSpikeError, RewindRule
from lightning_fp8.data.order import Mixture

BAD = range(14, 17)  # steps of data; an epoch has about 40


def without(monkeypatch, start, stop, *args, accumulate=1, batch_size=2, **options):
    """A run without a guard on a stream that lacks the steps of data [start, stop)."""
    at, size = Mixture.at, batch_size * accumulate

    def leap(order, position):
        return at(order, position + (stop - start) * size * (position >= start * size))

    with monkeypatch.context() as patched:
        patched.setattr(Mixture, "at", leap)
        return run(*args, accumulate_grad_batches=accumulate, batch_size=batch_size, **options)


class Counts(DummyLogger):
    """Keeps what a guard counts, by step."""

    def __init__(self):
        super().__init__()
        self.logged = {}

    def log_metrics(self, metrics, step=None):
        counts = {name: n for name, n in metrics.items() if name.startswith("guard/")}
        self.logged.update({step: counts} if counts else {})


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("accumulate", "on_disk"), [(1, False), (2, True)])
def test_a_rewind_leaves_nothing_of_a_spike(prepared, tmp_path, monkeypatch, accumulate, on_disk):
    batches = batches_of(prepared, 20 * accumulate)
    bad = [batches[i * accumulate] for i in BAD]
    rule = RewindRule(snapshot_every=6, margin=1, on_disk=on_disk)
    guarded = guard(rewind=rule)
    module, saved = run(tmp_path / "a", prepared, guarded, bad=bad, accumulate_grad_batches=accumulate)
    # Steps 15 and 16 (data 14, 15) confirm it; the check after step 16 goes back to the older snapshot of 6 and 12.
    (rewind,) = guarded.events
    assert (rewind.step, rewind.action) == (16, "rewind")
    assert "back to step 6 and leaves out steps 13 to 15 of" in rewind.message
    assert events(tmp_path / "a")[0]["action"] == "rewind"
    # The third bad batch alone is no spike, and stays in both.
    expected_module, expected = without(monkeypatch, 13, 16, tmp_path / "b", prepared, bad=bad, accumulate=accumulate)
    assert not (found := differences(trained(expected), trained(saved))), found
    again = module.seen[16 * accumulate :]
    assert differences(expected_module.seen[6 * accumulate :], again) == []
    assert len(again) == (STEPS - 6) * accumulate
    assert not list((tmp_path / "a").glob("snapshots/*"))
    ends = run(tmp_path / "c", prepared, bad=bad, accumulate_grad_batches=accumulate)[1]
    assert "state_dict" in str(differences(trained(ends), trained(saved)))  # the spike would have left something


def test_a_rewind_across_the_end_of_an_epoch(prepared, tmp_path, monkeypatch):
    size = 20
    epoch = len(data_of(prepared, size).train_dataloader())
    assert epoch == 16  # losses are looked at every second step
    bad = batches_of(prepared, epoch + 4, batch_size=size)[epoch + 2 : epoch + 4]
    options = {"bad": bad, "steps": 2 * epoch + 3, "batch_size": size}
    guarded = guard(rewind=RewindRule(snapshot_every=6, margin=0))
    saved = run(tmp_path / "a", prepared, guarded, **options)[1]
    assert [event.action for event in guarded.events] == ["rewind"]
    assert f"leaves out steps {epoch + 2} to {epoch + 3} of" in guarded.events[0].message
    expected = without(monkeypatch, epoch + 2, epoch + 4, tmp_path / "b", prepared, **options)[1]
    assert not (found := differences(trained(expected), trained(saved))), found
    loops = [run["loops"]["fit_loop"] for run in (expected, saved)]
    for loop in loops:
        loop["state_dict"].pop("combined_loader")  # the position is later by what was left out
    assert not (found := differences(*loops)), found


def test_a_spike_that_comes_again_is_cut_wider_and_then_given_up(prepared, tmp_path):
    batches = batches_of(prepared, 40)
    bad = [batches[i] for i in (14, 15, 16, 17, 18)]
    guarded, counts = guard(), Counts()
    run(tmp_path / "a", prepared, guarded, bad=bad, logger=counts)
    # [14, 16) is left out, and 16, 17 come next; then [16, 16 + 2 * 2), which is past the end of it.
    assert [event.action for event in guarded.events] == ["rewind", "rewind"]
    assert "leaves out steps 16 to 19 of" in guarded.events[1].message
    assert counts.logged == {event.step: {"guard/rewind": i + 1.0} for i, event in enumerate(guarded.events)}
    guarded = guard(rewind=RewindRule(snapshot_every=6, margin=0, max_rewinds=2))
    with pytest.raises(LossSpikeError, match="lower the learning rate"):
        run(tmp_path / "b", prepared, guarded, bad=batches[14:])
    assert [event.action for event in guarded.events] == ["rewind", "rewind", "give up"]
    assert events(tmp_path / "b")[-1]["action"] == "give up"


def test_what_waits_before_a_gap_in_the_data_keeps_its_place(prepared, tmp_path):
    batches = batches_of(prepared, 20)
    guarded = guard(check_every=3)
    run(tmp_path, prepared, guarded, bad=[batches[i] for i in (13, 14, 16, 17)])
    # [13, 15) is left out after step 13, whose loss nobody has looked at then. The next spike is of 16, not of 17.
    first, second = (event.message for event in guarded.events)
    assert "back to step 6 and leaves out steps 13 to 14 of" in first
    assert "leaves out steps 16 to 23 of" in second


@pytest.mark.parametrize("stop", [15, 20], ids=["between onset and decision", "after the rewind"])
def test_a_run_killed_around_a_rewind_ends_as_one_that_was_not(prepared, tmp_path, stop):
    batches = batches_of(prepared, 20)
    bad = [batches[i] for i in BAD]
    whole = guard()
    still = {"bad": bad, "noise": 0.0}  # Lightning does not resume the global random numbers
    expected = run(tmp_path / "whole", prepared, whole, **still)[1]
    folder = tmp_path / "killed"
    first = guard()
    assert run(folder, prepared, first, stop=stop, **still)[1] is None
    assert len(first.events) == (stop == 20)
    resume = tmp_path / "resume.ckpt"
    shutil.copy(folder / f"step={stop}.ckpt", resume)
    second = guard()
    saved = run(folder, prepared, second, seed=1, resume=resume, **still)[1]
    assert second.events == whole.events
    assert events(folder) == [vars(event) for event in whole.events]
    assert not (found := differences(expected, saved)), found
