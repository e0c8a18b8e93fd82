"""The benchmark of a step, at toy size: what it prints is what it measured, and its arms are what they are called."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # what benchmarks have in common
PATH = Path(__file__).parents[2] / "benchmarks/optimizer.py"


@pytest.fixture(scope="module")
def benchmark():
    if not PATH.exists():
        pytest.skip("benchmarks/ is not in a source distribution")
    spec = importlib.util.spec_from_file_location("optimizer", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_prints_and_writes_a_row_for_each_arm(benchmark, tmp_path, capsys):
    path = tmp_path / "results.json"
    arms = ["torch fused", "FP8AdamW fp8", "coat, operations"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "STEPS", 20)
        left_out = ("compiled", "fp8_lm")
        few = {name: arm for name, arm in benchmark.all_arms().items() if not any(part in name for part in left_out)}
        patch.setattr(benchmark, "all_arms", lambda: few)
        benchmark.main(
            ["--elements", "16384", "--repeats", "3", "--device", "cpu", "--arms", *arms, "--json", str(path)]
        )
    written = json.loads(path.read_text())
    assert torch.__version__.startswith(written["versions"]["torch"])
    assert {"device", "commit", "setting"} <= set(written)
    rows = written["rows"]
    assert list(rows) == [
        "torch fused fp32",
        "torch fused bf16",
        "FP8AdamW fp8",
        "FP8AdamW fp8, operations",
        "FP8AdamW coat, operations",
    ]
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert 0 < row["low"] <= row["ms"] <= row["high"]
        assert row["x fused fp32"] == rows["torch fused fp32"]["ms"] / row["ms"]
        assert row["ns/param"] == pytest.approx(1e6 * row["ms"] / 16384)
        line = next(line for line in printed.splitlines() if line.startswith(f"{name}  "))
        assert f"{row['ms']:.4g}" in line
    # The step count is the only other state: 4 or 8 bytes a parameter of 128 x 128.
    figures = {name: row["B/param"] for name, row in rows.items()}
    assert figures == pytest.approx(
        {
            "torch fused fp32": 16,
            "torch fused bf16": 8,
            "FP8AdamW fp8": 4 + 2 + 8 / 128,
            "FP8AdamW fp8, operations": 4 + 2 + 8 / 128,
            "FP8AdamW coat, operations": 4 + 2 + 24 / 128,
        },
        abs=8 / 128**2,
    )
    errors = {name: row["relL2 %"] / 100 for name, row in rows.items()}
    assert errors["torch fused fp32"] == 0
    assert 0 < errors["torch fused bf16"] < 0.01
    assert errors["FP8AdamW fp8"] == errors["FP8AdamW fp8, operations"] < 0.05
    assert errors["FP8AdamW coat, operations"] > errors["FP8AdamW fp8"]


def test_an_arm_that_refuses_the_device_says_why(benchmark, monkeypatch, capsys):
    def make(params, **options):
        raise NotImplementedError("no CPUs\nat all")

    found = benchmark.measure({"other": benchmark.Arm(make)}, 4096, "cpu", 2, cpu_time=True)
    assert found == {"other": {"refused": "NotImplementedError: no CPUs"}}
    monkeypatch.setattr(benchmark, "all_arms", lambda: {"other": benchmark.Arm(make)})
    monkeypatch.setattr(benchmark, "errors", lambda arms, device: {})
    benchmark.main(["--elements", "4096", "--repeats", "2", "--device", "cpu"])
    assert "other: NotImplementedError: no CPUs" in capsys.readouterr().out


def test_only_the_arm_that_is_called_so_uses_the_kernel(benchmark):
    arms = benchmark.all_arms()
    assert [name for name, arm in arms.items() if name.startswith("FP8AdamW") and arm.kernel] == ["FP8AdamW fp8"]
    with arms["FP8AdamW fp8, operations"].stepping():
        assert not benchmark.packing.has_adamw(torch.zeros(1), torch.zeros(1))
