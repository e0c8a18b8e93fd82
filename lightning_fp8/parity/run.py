"""Carries trials out, each by `lightning-fp8 fit` in a process of its own: one that fails takes no other with it.

A trial that is done is not run again, and one that was killed goes on from its last checkpoint. A comparison that was
killed itself leaves the process of its trial alive; the lock which that process holds says so.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_fp8.callbacks.run_log import RunLog
from lightning_fp8.parity.trials import Trial

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 20  # for a process that was told to end


@dataclass(frozen=True)
class _Running:
    trial: Trial
    process: subprocess.Popen[bytes]


def run(trials: Sequence[Trial], *, jobs: int = 1) -> dict[str, str]:
    """Runs those that are not done, and shows how far all are.

    Args:
        trials: In the order in which they are started.
        jobs: How many at a time; they share the CPU's cores. Speeds are comparable with one.

    Returns:
        Why trials failed, by name; empty if all are done.

    Raises:
        ValueError: One of the trials is being trained by another process, or has another configuration.
    """
    for trial in trials:
        trial.prepare()
    waiting = [trial for trial in trials if not trial.finished]
    running: list[_Running] = []
    failures: dict[str, str] = {}
    with _bar() as bar:
        task = bar.add_task("", total=sum(trial.steps for trial in trials))
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(_start(waiting.pop(0), jobs))
                bar.update(
                    task,
                    completed=sum(map(_steps_taken, trials)),
                    description=", ".join(one.trial.name for one in running),
                )
                time.sleep(POLL_SECONDS)
                for ended in [one for one in running if one.process.poll() is not None]:
                    running.remove(ended)
                    if failure := _end(ended):
                        failures[ended.trial.name] = failure
                    done = sum(trial.finished for trial in trials)
                    said = f"failed: {failure}" if failure else "done"
                    bar.console.print(f"{ended.trial.name}: {said} ({done} of {len(trials)})", highlight=False)
        finally:
            _stop(running)
    return failures


def _start(trial: Trial, jobs: int) -> _Running:
    command = [sys.executable, "-m", "lightning_fp8", "fit", "--config", str(trial.beside("yaml"))]
    if trial.checkpoint.exists():
        command += ["--ckpt_path", "last"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    with trial.beside("lock").open("w") as lock, trial.beside("log").open("a") as log:
        _lock(lock, trial)
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**threads, **os.environ},
            pass_fds=(lock.fileno(),),
        )
    return _Running(trial, process)


def _lock(file: IO[str], trial: Trial) -> None:
    """Holds the trial for as long as this process, or one that inherits the open file, has it."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(
            f"{trial.place} is being trained by another process, perhaps of a comparison that was killed: wait until it"
            " has ended, and call again."
        ) from None


def _end(ended: _Running) -> str | None:
    """Notes that a trial is done, or says why not."""
    code = ended.process.returncode
    if code == 0:
        ended.trial.beside("done").touch()
        return None
    log = ended.trial.beside("log")
    return f"{_last_words(log) or f'exit code {code}'} (see {log})"


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("lightning-fp8: ")]
    return (ours or lines or [""])[-1].removeprefix("lightning-fp8: ")


def _stop(running: Sequence[_Running]) -> None:
    for one in running:
        one.process.terminate()
    for one in running:
        with suppress(subprocess.TimeoutExpired):
            one.process.wait(PATIENCE_SECONDS)
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def _steps_taken(trial: Trial) -> int:
    if trial.finished:
        return trial.steps
    rows = RunLog(str(trial.place)).rows()
    return int(rows[-1]["step"]) + 1 if rows else 0


def _bar() -> Progress:
    # In a log file rich would leave an empty line for the bar; what is printed through it stays.
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        transient=True,
        disable=not sys.stdout.isatty(),
    )
