"""The main job, shortened, through the command line, as a newcomer runs it."""

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

ROOT = Path(__file__).parent.parent
STEPS = 24
SMALL = [
    "--model.config.hidden_size=64",
    "--model.config.num_layers=2",
    "--model.config.intermediate_size=128",
    "--model.schedule.init_args.warmup_steps=4",
    "--data.sequence_length=32",
    "--data.batch_size=8",
    f"--trainer.max_steps={STEPS}",
    "--trainer.val_check_interval=12",
    "--trainer.log_every_n_steps=1",
    "--trainer.limit_val_batches=4",
]


def command(*args):
    return [sys.executable, "-m", "lightning_fp8", *args]


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # quicker for tensors of this size


def run(*args, cwd):
    result = subprocess.run(
        command(*args), cwd=cwd, env=ONE_THREAD, capture_output=True, text=True, check=False, timeout=240
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def fit(*args, cwd):
    return run("fit", "-c", str(ROOT / "configs/quickstart.yaml"), *SMALL, *args, cwd=cwd)


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def losses(folder):
    return {int(row["step"]): row["train/loss"] for row in rows(folder) if row.get("train/loss")}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a small corpus, prepared."""
    folder = tmp_path_factory.mktemp("quickstart")
    source = Path(os.__file__).parent
    files = ["abc.py", "argparse.py", "ast.py", "bisect.py", "calendar.py", "csv.py", "dis.py", "enum.py", "heapq.py"]
    names = ["--sources", json.dumps([str(source / name) for name in files])]
    run(
        "prepare",
        *names,
        "--output_dir",
        "data/quickstart",
        "--vocab_size",
        "2048",
        "--val_fraction",
        "0.2",
        cwd=folder,
    )
    return folder


@pytest.fixture(scope="module")
def finished(work):
    """A finished run and what it printed."""
    printed = fit(cwd=work)
    return work / "runs/quickstart", printed


def test_the_run_folder_is_complete(finished):
    folder, printed = finished
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.csv", "loss.png", "checkpoints", "summary.json", "tokenizer.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (folder / "checkpoints/last.ckpt").is_file()
    assert "bits per byte" in printed
    assert "gzip -9" in printed


def test_the_loss_falls(finished):
    curve = losses(finished[0])
    assert sorted(curve) == list(range(STEPS))
    assert float(curve[STEPS - 1]) < float(curve[0]) - 0.5


def test_the_summary_says_what_ran_in_fp8(finished):
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert summary["fp8/linears"] == 2 * 7
    # What an independent count gives for this decoder: blocks in FP8; head and attention in bf16.
    hidden, inner, vocab, length, layers = 64, 128, 2048, 32, 2
    block = 4 * hidden * hidden + 3 * hidden * inner
    attention = 2 * length * hidden * 3.5 / 3  # backward recomputes q k^T: 3.5 times the forward, where GEMMs have 3
    assert summary["fp8/flop_share"] == pytest.approx(
        layers * block / (layers * (block + attention) + hidden * vocab), rel=0.02
    )
    assert summary["val/bits_per_byte"] > 0
    assert summary["val/perplexity"] == pytest.approx(torch.tensor(summary["val/loss"]).exp().item(), rel=1e-4)
    assert summary["tokens_per_second"] > 0


def test_weights_gradients_and_moments_take_six_bytes(finished):
    per_param = json.loads((finished[0] / "summary.json").read_text())["bytes_per_param"]
    assert per_param["weights"] == 2.0
    assert per_param["grads"] == 2.0
    # one byte each, and 9 bytes of scales a block; width 64 fills only half of a block of 128
    assert 2.0 < per_param["moments"] < 2.25


def test_the_moments_in_the_checkpoint_are_one_byte(finished):
    checkpoint = torch.load(finished[0] / "checkpoints/last.ckpt", weights_only=True)
    states = checkpoint["optimizer_states"][0]["state"].values()
    quantized = [state for state in states if "m_codes" in state]
    assert len(quantized) == 2 + 2 * 7  # embedding, head and seven projections a block
    for state in quantized:
        assert state["m_codes"].dtype is state["v_codes"].dtype is torch.uint8
        assert state["m_codes"].any()
        assert state["v_codes"].any()
    assert all(weight.dtype is torch.bfloat16 for weight in checkpoint["state_dict"].values())


def test_the_prompt_is_continued(finished, work):
    args = ["--ckpt", "runs/quickstart/checkpoints/last.ckpt", "--prompt", "def ", "--max_new_tokens", "8"]
    printed = run("generate", *args, cwd=work)
    assert printed.startswith("def ")
    assert len(printed) > len("def \n")


def test_the_checkpoint_can_be_validated_and_the_run_folder_stays(finished, work):
    folder, _ = finished
    config = (folder / "config.yaml").read_bytes()
    before = rows(folder)
    args = ["-c", str(ROOT / "configs/quickstart.yaml"), *SMALL[:3], *SMALL[4:6], "--trainer.limit_val_batches=4"]
    printed = run("validate", *args, "--ckpt_path", "runs/quickstart/checkpoints/last.ckpt", cwd=work)
    summary = json.loads((folder / "summary.json").read_text())
    assert f"{summary['val/loss']:.4f}"[:5] in printed
    assert rows(folder) == before
    assert (folder / "config.yaml").read_bytes() == config


def test_the_bf16_twin_runs_without_fp8(work):
    args = ["-c", str(ROOT / "configs/precision/bf16.yaml"), "--trainer.default_root_dir=runs/bf16"]
    fit(*args, cwd=work)
    summary = json.loads((work / "runs/bf16/summary.json").read_text())
    assert summary["fp8/linears"] == 0
    assert summary["fp8/flop_share"] == 0
    # fp32 weights, gradients and moments; the step counter of each parameter is all that comes on top
    assert summary["bytes_per_param"] == pytest.approx({"weights": 4, "grads": 4, "moments": 8}, rel=1e-3)


@pytest.mark.parametrize(
    ("recipe", "linears", "moments"),
    [
        ("nanotron", 7, 4),  # of three blocks the middle one; fp16 master, m and v of a byte
        ("fp8_lm", 21, 5),  # the head apart, all; fp16 master, m of a byte and v of two
    ],
)
def test_others_recipes_learn_and_take_their_bytes(work, recipe, linears, moments):
    config = ROOT / f"configs/recipes/{recipe}.yaml"
    fit("-c", str(config), "--model.config.num_layers=3", "--model.schedule.init_args.warmup_steps=4", cwd=work)
    folder = work / f"runs/{recipe}"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["fp8/linears"] == linears
    per_param = summary["bytes_per_param"]
    assert per_param["weights"] == per_param["grads"] == 2.0
    # and 9 bytes of scales a block, of which width 64 fills half; gains and sinks have 8 bytes of moments
    assert moments + 9 / 128 < per_param["moments"] < moments + 2 * 9 / 128 + 0.03
    curve = losses(folder)
    assert float(curve[STEPS - 1]) < float(curve[0]) - 0.5


@pytest.mark.parametrize("kill_after", [8, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5, 13, 17))])
def test_a_killed_run_continues_exactly(finished, work, tmp_path, kill_after):
    """SIGKILL, then `--ckpt_path last`: every row of the log is that of the uninterrupted run."""
    folder = tmp_path / "killed"
    options = [f"--trainer.default_root_dir={folder}", "--trainer.callbacks+=lightning_fp8.callbacks.LastCheckpoint"]
    options += ["--trainer.callbacks.init_args.every_n_steps=3"]
    process = subprocess.Popen(
        command("fit", "-c", str(ROOT / "configs/quickstart.yaml"), *SMALL, *options),
        cwd=work,
        env=ONE_THREAD,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while not ((folder / "metrics.csv").exists() and len(losses(folder)) > kill_after):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert len(losses(folder)) < STEPS
    fit(*options, "--ckpt_path", "last", cwd=work)
    assert losses(folder) == losses(finished[0])
    states = [torch.load(f / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for f in (folder, finished[0])]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
