"""The benchmark of the plugin, at the size of a toy: that it runs, and what it writes."""

import importlib.util
import json
import sys
from pathlib import Path

PATH = Path(__file__).parents[1] / "benchmarks" / "plugin.py"


def test_the_benchmark_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("benchmark_of_the_plugin", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    size = ["--hidden-size", "64", "--layers", "1", "--length", "16", "--batch-size", "1", "--repeats", "3"]
    monkeypatch.setattr(sys, "argv", ["plugin.py", *size, "--json", str(tmp_path / "x.json")])
    module.main()
    assert "16 tokens a step" in capsys.readouterr().out
    written = json.loads((tmp_path / "x.json").read_text())
    assert list(written["arms"]) == ["bf16", "fp8 tensorwise", "fp8 delayed"]
    assert written["setting"]["hidden_size"] == 64
    assert written["arms"]["bf16"]["of_bf16"] == 1
    for arm in written["arms"].values():
        low, high = arm["quartiles"]
        assert 0 < low <= arm["seconds"] <= high
        assert arm["tokens_per_second"] == 16 / arm["seconds"]
