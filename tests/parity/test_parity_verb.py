"""`lightning-fp8 parity` as a whole: real runs, one of them killed, and the comparison called again."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_fp8.cli.main import main

CONFIG = """
model:
  config: {vocab_size: 272, hidden_size: 64, num_layers: 1, num_heads: 2, num_kv_heads: 2, intermediate_size: 64}
  optimizer: {class_path: lightning_fp8.optim.FP8AdamW, init_args: {lr: 1.0e-3}}
  schedule: {class_path: lightning_fp8.optim.WarmupCosine, init_args: {warmup_steps: 4, final_ratio: 0.0}}
data: {path: DATA, sequence_length: 8, batch_size: 2}
fp8: {weights: bf16}
trainer: {accelerator: cpu, limit_val_batches: 2, callbacks: []}
"""


def parity(folder: Path, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "lightning_fp8", "parity", "-c", str(folder / "config.yaml"), *options]
    return subprocess.Popen(
        [*command, "--output", str(folder / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def call(folder: Path, *options: str) -> tuple[int, str]:
    process = parity(folder, *options)
    said = process.communicate(timeout=400)[0]
    return process.returncode, said


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG.replace("DATA", str(prepared)))
    return tmp_path


def steps(run: Path) -> list[int]:
    with (run / "metrics.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row.get("train/loss")]


def wait_for(found: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 200
    while not found.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def test_arms_are_trained_and_compared(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-fp8"])  # reading configurations sets it
    options = ["--steps", "6", "--seeds", "1", "--arms", "bf16", "fp8", "--no-control", "--jobs", "2"]
    with pytest.raises(SystemExit) as stopped:
        main(["parity", "-c", str(folder / "config.yaml"), *options, "--output", str(folder / "out")])
    assert stopped.value.code == 1  # one seed decides nothing
    assert "One seed" in capsys.readouterr().out
    arms = json.loads((folder / "out/parity.json").read_text())["arms"]
    # The same weights at the start: the first losses differ by what BF16 weights and FP8 GEMMs round.
    assert arms["bf16"]["first_losses"]["1"] == pytest.approx(arms["fp8"]["first_losses"]["1"], rel=2e-3)
    assert sum(arms["bf16"]["bytes_per_param"].values()) == pytest.approx(16, abs=0.01)
    assert sum(arms["fp8"]["bytes_per_param"].values()) < 7
    for arm in arms.values():
        assert arm["validated"]
        assert arm["grad_norm"] > 0
        assert arm["update_ratio"] > 0
    assert arms["fp8"]["worst_layers"]


@pytest.mark.slow
def test_a_comparison_that_was_killed_goes_on_and_ends_the_same(folder: Path) -> None:
    """Killed with its run, after the first checkpoint; three seconds a run are imports."""
    wanted = ("--steps", "400", "--seeds", "0", "--arms", "fp8", "bf16", "--no-control")
    trials = folder / "out/trials"
    process = parity(folder, *wanted)
    wait_for(trials / "fp8-0/checkpoints/last.ckpt", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in [process.pid, *map(int, children)]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert not (trials / "fp8-0.done").exists()
    first = steps(trials / "fp8-0")
    assert 0 < len(first) < 200  # every second step is logged

    code, said = call(folder, *wanted)
    assert "One seed" in said
    assert code == 1  # nothing is decided
    assert steps(trials / "fp8-0") == steps(trials / "bf16-0") == list(range(1, 400, 2))
    log = (trials / "fp8-0.log").read_text()
    assert "Restoring states from the checkpoint" in log
    figures = json.loads((folder / "out/parity.json").read_text())["arms"]
    assert abs(figures["bf16"]["gap"]["mean"]) < 0.01
    # The same weights at the start: the first losses differ by what BF16 weights and FP8 GEMMs round.
    assert figures["bf16"]["first_losses"]["0"] == pytest.approx(figures["fp8"]["first_losses"]["0"], rel=2e-3)
    assert (folder / "out/parity.html").exists()

    touched = (trials / "fp8-0/metrics.csv").stat().st_mtime_ns
    call(folder, *wanted)
    assert (trials / "fp8-0/metrics.csv").stat().st_mtime_ns == touched


@pytest.mark.slow
def test_an_arm_that_fails_and_one_that_is_bad_are_told_apart_from_a_good_one(folder: Path) -> None:
    (folder / "broken.yaml").write_text("data: {path: nowhere}")
    (folder / "bad.yaml").write_text("model: {optimizer: {init_args: {lr: 3.0e-2}}}")
    own = [f"{name}={folder / f'{name}.yaml'}" for name in ("bad", "broken")]
    code, said = call(
        folder, "--steps", "60", "--seeds", "0", "1", "--arms", "bf16", "fp8", *own, "--jobs", "2", "--bar", "1"
    )
    figures = json.loads((folder / "out/parity.json").read_text())
    verdicts = {name: arm["verdict"] for name, arm in figures["arms"].items()}
    assert code == 1
    assert verdicts["broken"] == "failed"
    assert "lightning-fp8 prepare" in figures["failures"]["broken-0"]
    assert verdicts["bad"] not in ("parity", "void")
    assert "broken-1" in said


@pytest.mark.slow
def test_a_sweep_finds_the_rate_that_is_too_high(folder: Path) -> None:
    command = [sys.executable, "-m", "lightning_fp8", "sweep-lr", "-c", str(folder / "config.yaml")]
    options = ["--steps", "40", "--rates", "1e-5", "1e-3", "1e1", "--output", str(folder / "sweep"), "--jobs", "2"]
    subprocess.run([*command, *options], check=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    told = json.loads((folder / "sweep/sweep.json").read_text())
    for losses in told["losses"].values():
        assert losses["0.001"][0] < losses["1e-05"][0]
        assert losses["10"][0] is None or losses["10"][0] > losses["0.001"][0]
    assert all(value > 0 for value in told["sensitivity"].values())


def test_initial_weights_of_the_arms_are_the_same_but_for_rounding() -> None:
    """What pairing rests on: `fp8.weights: bf16` draws the weights that fp32 draws, and rounds them."""
    from lightning_fp8 import FP8Precision
    from lightning_fp8.models import Decoder, DecoderConfig

    config = DecoderConfig(
        vocab_size=64, hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=64
    )
    torch.manual_seed(3)
    plain = Decoder(config).state_dict()
    torch.manual_seed(3)
    plugin = FP8Precision(weights="bf16")
    with plugin.module_init_context():
        low = plugin.convert_module(Decoder(config)).state_dict()
    for name, weight in plain.items():
        assert low[name].dtype == torch.bfloat16
        assert (low[name].float() - weight).abs().max() <= weight.abs().max() * 2**-8, name
