"""How trials are carried out, with a stand-in for the training process: resumed, locked, never twice, failing alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_fp8.parity import run as runner
from lightning_fp8.parity.run import run
from lightning_fp8.parity.trials import Trial

# Called as `python -m lightning_fp8 fit --config FILE …`: notes its arguments and does what the configuration says.
STAND_IN = """#!/bin/sh
echo "$@" >> "$5.calls"
date +%s%N >> "$5.times"
if grep -q sleep "$5"; then exec sleep 30; fi
if grep -q nap "$5"; then sleep 1.5; fi
if grep -q break "$5"; then echo noise; echo "lightning-fp8: it broke."; echo more noise; exit 1; fi
if grep -q crash "$5"; then echo "the last line" >&2; kill -9 $$; fi
date +%s%N >> "$5.times"
"""


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text(STAND_IN)
    script.chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(script))
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)


def trial(folder: Path, name: str, does: str = "nothing", steps: int = 10) -> Trial:
    return Trial(name, 0, steps, {"does": does}, folder / "trials" / name)


def calls(one: Trial) -> list[str]:
    file = one.place.with_name(f"{one.name}.yaml.calls")
    return file.read_text().splitlines() if file.exists() else []


def test_a_trial_that_fails_takes_no_other_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials = [trial(tmp_path, "bad", "break"), trial(tmp_path, "dies", "crash"), trial(tmp_path, "good")]
    failures = run(trials)
    assert [one.finished for one in trials] == [False, False, True]
    assert set(failures) == {"bad", "dies"}
    assert failures["bad"].startswith("it broke. (see ")
    assert failures["dies"].startswith("the last line (see ")
    said = capsys.readouterr().out
    assert "good: done (1 of 3)" in said.replace("\n", " ")


def test_what_is_done_is_not_run_again_and_what_failed_is(tmp_path: Path) -> None:
    trials = [trial(tmp_path, "good"), trial(tmp_path, "bad", "break")]
    run(trials)
    run(trials)
    assert [len(calls(one)) for one in trials] == [1, 2]


def test_a_trial_with_a_checkpoint_goes_on_from_it(tmp_path: Path) -> None:
    one = trial(tmp_path, "one", "break")
    run([one])
    one.checkpoint.parent.mkdir(parents=True)
    one.checkpoint.touch()
    run([one])
    assert ["--ckpt_path last" in call for call in calls(one)] == [False, True]


def test_another_configuration_is_not_taken_for_the_same(tmp_path: Path) -> None:
    run([trial(tmp_path, "one")])
    with pytest.raises(ValueError, match="another configuration"):
        run([trial(tmp_path, "one", "nothing else")])


def test_as_many_run_at_a_time_as_there_are_jobs(tmp_path: Path) -> None:
    for jobs in (1, 2):
        trials = [trial(tmp_path / str(jobs), f"nap{number}", "nap") for number in range(2)]
        run(trials, jobs=jobs)
        (_, end), (start, _) = (
            tuple(map(int, one.place.with_name(f"{one.name}.yaml.times").read_text().split())) for one in trials
        )
        assert (start < end) == (jobs == 2)


# Holds a trial in a process of its own, as a comparison does, and is then killed.
HOLDER = """
import sys
from pathlib import Path
from lightning_fp8.parity import run as runner
from lightning_fp8.parity.trials import Trial
runner.sys.executable = sys.argv[1]
runner.run([Trial("one", 0, 10, {"does": "sleep"}, Path(sys.argv[2]))])
"""


def test_a_trial_that_outlived_its_comparison_is_left_alone(tmp_path: Path) -> None:
    one = trial(tmp_path, "one", "sleep")
    stand_in = runner.sys.executable
    python = os.path.join(sys.base_prefix, "bin", "python3")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    holder = subprocess.Popen([python, "-c", HOLDER, stand_in, str(one.place)], env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not calls(one):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        holder.kill()  # the comparison alone; its trial goes on
        holder.wait()
        with pytest.raises(ValueError, match="being trained by another process"):
            run([one])
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
    time.sleep(0.2)
    one.beside("yaml").unlink()
    assert not run([trial(tmp_path, "one")])  # the lock went with the process


def test_trials_end_with_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trial(tmp_path, "one", "sleep")
    started = []
    monkeypatch.setattr(runner, "_steps_taken", lambda _: 0)
    original = runner._start
    monkeypatch.setattr(runner, "_start", lambda *args: started.append(original(*args)) or started[-1])

    def interrupted(seconds: float) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run([one])
    assert started[0].process.poll() is not None
    assert not one.finished
