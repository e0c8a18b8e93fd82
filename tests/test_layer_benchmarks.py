"""The benchmarks of layers and casts at the size of toys: that they run, what they write, and that it can be drawn."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
PRESETS = ["tensorwise", "delayed", "rowwise", "rowwise_gw_hp", "blockwise", "mxfp8"]
BENCHMARKS = {
    "linear": (["--width", "32", "--layers", "1", "--tokens", "16", "--repeats", "2"], ["bf16", *PRESETS]),
    "overhead": (["--repeats", "2", "--calls", "1"], ["bf16", *PRESETS]),
    "cast": (["--rows", "64", "--columns", "64", "--repeats", "2"], ["copy", "swiglu, tensor", "norm, then 1x128"]),
}


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)

    def run(name, options):
        benchmark = __import__(name)
        path = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *options, "--json", str(path)])
        benchmark.main()
        return path

    yield run
    for name in BENCHMARKS:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_on_a_cpu(name, run, capsys):
    options, arms = BENCHMARKS[name]
    path = run(name, options)
    printed = capsys.readouterr().out
    assert "te is left out" in printed or name == "cast"
    written = json.loads(path.read_text())
    assert written["benchmark"] == name
    assert {"device", "versions", "commit", "changed", "setting"} <= written.keys()
    assert set(arms) <= written["rows"].keys()
    for row in written["rows"].values():
        time = row["ms" if name == "linear" else "us"]
        assert 0 < row["low"] <= time <= row["high"]
    assert "torchao" not in arms
    from plot import plot  # on the path that `run` has set

    assert plot(path).stat().st_size > 1000


def test_operations_of_a_tiny_layer(run):
    """What the host does in a step of a layer by default: counted, for timing would be noise. torchao's are 81."""
    path = run("overhead", ["--arms", "bf16", "tensorwise", "--repeats", "2", "--calls", "1"])
    rows = json.loads(path.read_text())["rows"]
    assert rows["bf16"]["operations"] == 10
    assert rows["tensorwise"]["operations"] <= 107
