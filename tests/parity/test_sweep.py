"""Sensitivity to the learning rate, of losses given by hand."""

import json
import math
from pathlib import Path

import pytest

from lightning_fp8.cli.main import main
from lightning_fp8.parity.sweep import Sweep, figures, markdown, rates_around, write

RATES = (0.1, 1.0, 10.0)


def sweep(losses: dict[str, tuple[float, ...]], failed: tuple[str, float] | None = None) -> Sweep:
    by_arm = {
        arm: {rate: {0: loss} for rate, loss in zip(RATES, found, strict=True) if (arm, rate) != failed}
        for arm, found in losses.items()
    }
    return Sweep(RATES, [0], by_arm, 4.0, {"x": "broke"} if failed else {})


def test_rates_are_even_on_a_log_scale() -> None:
    assert rates_around(1e-2, 7) == pytest.approx([3.16e-4, 1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1, 3.16e-1])
    with pytest.raises(ValueError, match="2 learning rates"):
        rates_around(1e-2, 1)


def test_a_sensitivity_is_what_a_wrong_rate_costs() -> None:
    found = sweep({"bf16": (3.0, 2.0, 2.5), "fp8": (3.0, 2.0, math.nan), "worse": (5.0, 2.0, math.inf)})
    assert found.sensitivity("bf16") == pytest.approx((3 + 2 + 2.5) / 3 - 2)
    assert found.sensitivity("fp8") == pytest.approx((3 + 2 + 4) / 3 - 2)  # what diverged has learnt nothing
    assert found.sensitivity("worse") == pytest.approx((4 + 2 + 4) / 3 - 2)
    assert figures(found, "")["ratio"]["fp8"] == pytest.approx(2.0)


def test_seeds_are_averaged() -> None:
    losses = {"a": {0.1: {0: 3.0, 1: 2.0}, 1.0: {0: 2.0, 1: 3.0}}}
    assert Sweep((0.1, 1.0), (0, 1), losses, 4.0, {}).sensitivity("a") == pytest.approx(0.5)


def test_a_run_that_failed_is_no_loss() -> None:
    found = sweep({"bf16": (3.0, 2.0, 2.5), "fp8": (3.0, 2.0, 2.5)}, failed=("fp8", 10.0))
    assert found.sensitivity("fp8") is None
    assert found.sensitivity("bf16") is not None
    assert "failed: broke" in markdown(figures(found, ""))


def test_the_report_is_whole(tmp_path: Path) -> None:
    write(sweep({"bf16": (3.0, 2.0, 2.5), "fp8": (3.0, 2.0, math.nan)}), tmp_path, "command")
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.json", "sweep.md", "sweep.html", "sweep.png"}
    told = json.loads((tmp_path / "sweep.json").read_text(), parse_constant=pytest.fail)
    assert told["losses"]["fp8"] == {"0.1": [3.0], "1": [2.0], "10": [None]}
    assert "| fp8 | 3.0000 | 2.0000 | diverged | 1.0000 | 2.000 |" in (tmp_path / "sweep.md").read_text()
    assert "data:image/png;base64," in (tmp_path / "sweep.html").read_text()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["parity"], 1, "-c configs/quickstart.yaml"),
        (["sweep-lr"], 1, "-c configs/quickstart.yaml"),
        (["parity", "-c", "x.yaml", "--seeds", "1", "1"], 1, "more than once"),
        (["parity", "-c", "x.yaml", "--jobs", "0"], 1, "--jobs 0"),
        (["parity", "-c", "x.yaml", "--arms", "bf16"], 1, "at least one more"),
        (["parity", "-c", "x.yaml", "--bar", "0"], 1, "above 0"),
        (["parity", "-c", "missing.yaml"], 2, "no configuration of `fit`"),
        (["parity", "--runs", "bf16"], 1, "not ARM=FOLDER,FOLDER"),
        (["parity", "--runs", "bf16=a"], 1, "two arms or more"),
        (["parity", "--seeds", "one"], 2, "--seeds"),
        (["sweep-lr", "-c", "x.yaml", "--rates", "1e-3"], 1, "two learning rates"),
        (["sweep-lr", "-c", "x.yaml", "--rates", "1e-3", "-1"], 1, "above 0"),
        (["sweep-lr", "-c", "x.yaml", "--rates", "1e-3", "nan"], 1, "finite"),
        (["parity", "-c", "x.yaml", "--bar", "nan"], 1, "above 0"),
        (["parity", "-c", "x.yaml", "--seeds", "-1"], 1, "from 0 to"),
    ],
    ids=str,
)
def test_a_mistake_is_told_briefly(
    options: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-fp8"])
    with pytest.raises(SystemExit) as stopped:
        main(options)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == code
    assert said in lines[-1]
    assert lines[-1].startswith("lightning-fp8: ")
    assert len(lines) <= 3
