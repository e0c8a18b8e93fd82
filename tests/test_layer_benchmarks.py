"""The benchmarks at the size of toys: that they run on a CPU, what they write, and that it can be drawn."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
BOTH = ["bf16", "tensorwise", "tensorwise+fused"]
PRESETS = ["tensorwise", "delayed", "rowwise", "rowwise_gw_hp", "blockwise", "mxfp8"]
# name -> options, rows among those that are written, and how their times are called
BENCHMARKS = {
    "linear": (["--width", "32", "--layers", "1", "--tokens", "16", "--repeats", "2"], ["bf16", *PRESETS], "ms"),
    "overhead": (["--repeats", "2", "--calls", "1"], ["bf16", *PRESETS], "us"),
    "cast": (
        ["--rows", "64", "--columns", "64", "--repeats", "2"],
        ["copy", "swiglu, tensor", "norm, then 1x128"],
        "us",
    ),
    "block": (
        ["--eager", "--hidden-size", "32", "--length", "16", "--repeats", "2", "--arms", *BOTH, "te"],
        [f"{arm}, eager" for arm in BOTH],
        "ms",
    ),
    "train": (["--repeats", "2", "--rounds", "1", "--arms", "mixed", *BOTH, "te"], ["mixed", *BOTH], "ms"),
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
    options, arms, unit = BENCHMARKS[name]
    path = run(name, options)
    printed = capsys.readouterr().out
    assert "te is left out" in printed or name == "cast"
    written = json.loads(path.read_text())
    assert written["benchmark"].startswith(name)
    assert {"device", "versions", "commit", "changed", "setting"} <= written.keys()
    assert set(arms) <= written["rows"].keys()
    for row in written["rows"].values():
        assert 0 < row["low"] <= row[unit] <= row["high"]
    from plot import plot  # on the path that `run` has set

    assert plot(path).stat().st_size > 1000


def test_bytes_that_a_cast_has_to_move(run):
    rows = json.loads(run("cast", BENCHMARKS["cast"][0]).read_text())["rows"]
    assert rows["copy"]["B/element"] == 2 + 2
    assert rows["tensor: rows"]["B/element"] == 2 + 2 + 1
    assert rows["tensor, delayed: both"]["B/element"] == 2 + 1 + 1
    assert rows["swiglu, tensor, delayed"]["B/element"] == rows["swiglu, then tensor, delayed"]["B/element"] == 4 + 2
    assert rows["norm, tensor"]["B/element"] == 2 + 2 + 2


def test_operations_of_a_tiny_layer(run):
    """What the host does in a step of a layer: counted, for timing would be noise. torchao's tensorwise are 81."""
    path = run("overhead", ["--arms", "bf16", "tensorwise", "mxfp8", "--repeats", "2", "--calls", "1"])
    rows = json.loads(path.read_text())["rows"]
    assert rows["bf16"]["operations"] == 10
    assert rows["tensorwise"]["operations"] <= 104
    assert rows["mxfp8"]["operations"] <= 196
