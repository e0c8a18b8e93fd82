"""The quickstart at its full size: what it promises, measured. Minutes long, so all of it is slow."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # what benchmarks have in common
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    """The summary of `make train`, and gzip's bits per byte of the same held-out files."""
    folder = tmp_path_factory.mktemp("full")
    for verb, config in (("prepare", "configs/data/quickstart.yaml"), ("fit", "configs/quickstart.yaml")):
        command = [sys.executable, "-m", "lightning_fp8", verb, "-c", str(ROOT / config)]
        subprocess.run(command, cwd=folder, check=True, timeout=7200)
    manifest = json.loads((folder / "data/quickstart/manifest.json").read_text())
    measured = json.loads((folder / "runs/quickstart/summary.json").read_text())
    return measured, manifest["splits"]["val"]["gzip_bits_per_byte"]


def test_it_needs_less_than_gzip(summary):
    measured, gzip = summary
    assert measured["val/bits_per_byte"] <= 0.92 * gzip


def test_it_takes_six_bytes_a_parameter(summary):
    assert sum(summary[0]["bytes_per_param"].values()) <= 6.15


def test_emulation_costs_little():
    spec = importlib.util.spec_from_file_location("step", ROOT / "benchmarks/step.py")
    step = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(step)
    timings = step.measure(batch_size=16, length=128, repeats=20, device=torch.device("cpu"))
    assert timings["fp8"].median <= 1.35 * timings["bf16"].median
