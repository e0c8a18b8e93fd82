"""What a comparison says of runs that are there: it must be able to say no."""

import json
import re
from pathlib import Path

import pytest
from logged_runs import write_run

from lightning_fp8.cli.main import main
from lightning_fp8.parity.compare import Comparison, compare
from lightning_fp8.parity.outcome import read_outcome
from lightning_fp8.parity.report import markdown, write

SEEDS = (0, 1, 2)
REFERENCE = (2.0, 2.1, 1.9)


def comparison(folder: Path, arms: dict[str, tuple[float, ...]], control: str | None = "control") -> Comparison:
    outcomes = {
        name: {
            seed: read_outcome(write_run(folder / f"{name}-{seed}", [3.0, 2.5], loss, grad_norm=1.0, update_ratio=1e-3))
            for seed, loss in enumerate(losses)
        }
        for name, losses in {"reference": REFERENCE, **arms}.items()
    }
    return compare(outcomes, {name: f"the {name}" for name in outcomes}, SEEDS, control=control)


def scaled(*factors: float) -> tuple[float, ...]:
    return tuple(loss * factor for loss, factor in zip(REFERENCE, factors, strict=False))


GOOD, BAD, DEAD = scaled(1.001, 0.999, 1.0), scaled(1.02, 1.022, 1.021), scaled(1.8, 1.7, 1.9)


def verdicts(found: Comparison) -> dict[str, str | None]:
    return {result.name: result.verdict for result in found.results}


def test_a_good_arm_passes_and_a_bad_one_fails(tmp_path: Path) -> None:
    found = comparison(tmp_path, {"good": GOOD, "bad": BAD, "control": DEAD})
    assert verdicts(found) == {"reference": None, "good": "parity", "bad": "worse", "control": "worse"}
    assert not found.passed


def test_a_control_that_passes_makes_parity_void(tmp_path: Path) -> None:
    found = comparison(tmp_path, {"good": GOOD, "bad": BAD, "control": GOOD})
    assert verdicts(found) == {"reference": None, "good": "void", "bad": "worse", "control": "parity"}
    assert not found.passed


def test_the_control_is_not_asked_to_pass(tmp_path: Path) -> None:
    assert comparison(tmp_path, {"good": GOOD, "control": DEAD}).passed


def test_a_comparison_without_control_says_so(tmp_path: Path) -> None:
    found = comparison(tmp_path, {"good": GOOD}, control=None)
    assert found.passed
    assert "There was no control" in markdown(write(found, tmp_path / "out", "command"))


@pytest.mark.parametrize("control", ["control", None])
def test_an_arm_that_lacks_a_seed_has_failed(tmp_path: Path, control: str | None) -> None:
    found = comparison(tmp_path, {"good": GOOD[:2], "control": DEAD}, control)
    assert verdicts(found)["good"] == "failed"
    assert not found.passed


@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_a_reference_that_diverged_judges_nobody(tmp_path: Path, lost: float) -> None:
    outcomes = {
        name: {s: read_outcome(write_run(tmp_path / f"{name}{s}", [3.0], loss)) for s, loss in enumerate(losses)}
        for name, losses in {"reference": (2.0, lost), "arm": (2.0, 2.0)}.items()
    }
    found = compare(outcomes, {"reference": "", "arm": ""}, (0, 1), control=None)
    assert verdicts(found)["arm"] == "failed"


def test_one_seed_decides_nothing_and_says_so(tmp_path: Path) -> None:
    outcomes = {name: {0: read_outcome(write_run(tmp_path / name, [3.0], 2.0))} for name in ("reference", "arm")}
    found = compare(outcomes, {"reference": "", "arm": ""}, [0], control=None)
    assert verdicts(found)["arm"] == "undecided"
    assert "One seed" in markdown(write(found, tmp_path / "out", "command"))


def test_the_report_is_whole_and_stands_alone(tmp_path: Path) -> None:
    found = comparison(tmp_path, {"good": GOOD, "bad": BAD, "control": DEAD})
    write(found, tmp_path / "out", "lightning-fp8 parity <b>")
    left = {path.name for path in (tmp_path / "out").iterdir()}
    pictures = {"gaps.png", "losses.png", "gaps_over_steps.png", "grad_norm.png", "update_ratio.png"}
    assert left == {"parity.json", "parity.md", "parity.html", *pictures}
    page = (tmp_path / "out/parity.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script" not in page
    assert "&lt;b&gt;" in page
    figures = json.loads((tmp_path / "out/parity.json").read_text())
    assert figures["arms"]["bad"]["verdict"] == "worse"
    assert figures["arms"]["bad"]["gap"]["mean"] == pytest.approx(0.021)
    assert figures["arms"]["good"]["losses"] == {str(seed): loss for seed, loss in enumerate(GOOD)}
    text = (tmp_path / "out/parity.md").read_text()
    assert "| bad | 2.0400, 2.1462, 1.9399 | 1.0210 | +2.100% |" in text
    assert "lightning-fp8 parity" in text


def test_a_loss_that_is_not_finite_is_no_number_in_the_report(tmp_path: Path) -> None:
    found = comparison(tmp_path, {"lost": scaled(1.0, float("nan"), 1.0), "control": DEAD})
    write(found, tmp_path / "out", "command")
    assert verdicts(found)["lost"] == "worse"
    figures = json.loads((tmp_path / "out/parity.json").read_text(), parse_constant=pytest.fail)
    assert figures["arms"]["lost"]["gap"]["mean"] is None


def test_without_a_last_validation_the_end_of_training_counts(tmp_path: Path) -> None:
    train = [5.0] * 18 + [2.0, 4.0]
    assert read_outcome(write_run(tmp_path / "a", train)).loss == pytest.approx(3.0)
    validated = read_outcome(write_run(tmp_path / "b", train, 2.5))
    assert (validated.loss, validated.bits_per_byte, validated.validated) == (2.5, 1.25, True)
    file = write_run(tmp_path / "c", train[:10], 2.5) / "metrics.csv"
    file.write_text(file.read_text() + "10,1.0,,\n")  # trained on after the validation
    assert read_outcome(tmp_path / "c").validated is False


def logged(folder: Path, **of_second: object) -> list[str]:
    texts = []
    for name, factor in (("bf16", 1.0), ("fp8", 1.001)):
        for seed in (0, 1):
            config = {"seed_everything": seed, "data": {"seed": seed}, **(of_second if name == "fp8" else {})}
            write_run(folder / f"{name}-{seed}", [3.0], (2 + seed) * factor, config=config)
        texts.append(f"{name}={folder / f'{name}-0'},{folder / f'{name}-1'}")
    return texts


def test_logged_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["parity", "--runs", *logged(tmp_path), "--output", str(tmp_path / "out")])
    assert "fp8: **parity**" in capsys.readouterr().out


def test_logged_runs_that_are_no_pairs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = logged(tmp_path, data={"seed": 7})
    with pytest.raises(SystemExit) as stopped:
        main(["parity", "--runs", *runs, "--output", str(tmp_path / "out")])
    assert stopped.value.code == 1
    assert "no pair: their data differ" in capsys.readouterr().err
