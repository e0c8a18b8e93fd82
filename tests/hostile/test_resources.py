"""A long run holds no more at its end than at its beginning, and two runs at once do not meet."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hostile.held import READINGS
from hostile.world import CKPT, fit, make

from lightning_fp8.cli.main import main

STEPS = 10_000
WARM = 2_000  # by then every cache, buffer and pool has its size
SLACK = 8 << 20  # of resident memory: what the allocator moves about; a leak of 1 kB a step would add as much


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells what a process holds")
def test_ten_thousand_steps_hold_no_more_than_two_thousand(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-fp8"])
    options = [f"--trainer.max_steps={STEPS}", "--trainer.callbacks+=hostile.held.Held"]
    main(fit(*options, "--trainer.log_every_n_steps=50", "--trainer.default_root_dir=long"))
    begun, ended = READINGS[WARM], READINGS[STEPS]
    print(READINGS)
    assert ended["files"] == begun["files"]
    assert ended["threads"] == begun["threads"]
    assert ended["objects"] == begun["objects"]
    assert ended["bytes"] - begun["bytes"] < SLACK


@pytest.mark.slow
def test_two_runs_at_once_do_not_disturb_each_other(tmp_path, monkeypatch):
    """Both read one set through one cache of fetched chunks, which is empty when they begin."""
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LITDATA_CACHE_DIR", str(tmp_path / "cache"))

    def begin(name):
        options = [f"--data.path=local:{tmp_path}/data", f"--trainer.default_root_dir={name}", "--trainer.max_steps=30"]
        return subprocess.Popen([sys.executable, "-m", "lightning_fp8", *fit(*options)], stderr=subprocess.PIPE)

    alone = begin("alone")
    assert alone.wait(120) == 0
    for path in sorted((tmp_path / "cache").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    runs = [begin("first"), begin("second")]
    assert [run.wait(240) for run in runs] == [0, 0], [run.stderr.read() for run in runs]
    weights = [
        torch.load(Path(name, *Path(CKPT).parts[1:]), weights_only=True)["state_dict"]
        for name in ("alone", "first", "second")
    ]
    for other in weights[1:]:
        assert all(torch.equal(other[name], value) for name, value in weights[0].items())
    assert not list((tmp_path / "cache").rglob("*.part"))
