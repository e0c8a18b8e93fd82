"""Healthy runs raise no alarm: the quickstart for 450 steps, monitored and guarded, with ten seeds.

An alarm that is wrong once in a hundred runs is switched off before it is right. Minutes for each seed; a single one is

    pytest -m slow tests/stability/test_clean_runs.py -k "seed-7"
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = ("configs/quickstart.yaml", "configs/stability/monitor.yaml", "configs/stability/guard.yaml")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The prepared data of the quickstart."""
    folder = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-m", "lightning_fp8", "prepare", "-c", str(ROOT / "configs/data/quickstart.yaml")]
    subprocess.run(command, cwd=folder, check=True, timeout=3600)
    return folder / "data/quickstart"


def alarms(folder, text, seed, *options):
    """What the guard of a run said."""
    command = [sys.executable, "-m", "lightning_fp8", "fit"]
    for config in CONFIGS:
        command += ["-c", str(ROOT / config)]
    settings = {"seed_everything": seed, "trainer.max_steps": 450, "trainer.val_check_interval": 150, "data.path": text}
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    command += ["--trainer.default_root_dir", str(folder), *options]
    subprocess.run(command, check=True, timeout=7200)
    assert len((folder / "fp8.csv").read_text().splitlines()) > 45 * 21 * 3  # it was looked at
    events = folder / "events.jsonl"  # there is none without an event
    return [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []


@pytest.mark.parametrize("seed", range(10), ids=lambda seed: f"seed-{seed}")
def test_a_clean_quickstart_raises_no_alarm(text, tmp_path, seed):
    assert alarms(tmp_path / "run", text, seed) == []


def test_nor_does_one_with_delayed_scaling(text, tmp_path):
    assert alarms(tmp_path / "run", text, 0, "--fp8.recipe", "delayed") == []
