from pathlib import Path

import pytest

from lightning_fp8.cli.main import main
from lightning_fp8.hardware import ACCELERATORS

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
README = Path(__file__).parents[2] / "README.md"
BASELINE = str(Path(__file__).parents[2] / "configs" / "precision" / "bf16.yaml")
TEN_BILLION = [
    *("--model.config.vocab_size", "49152"),
    *("--model.config.hidden_size", "4096"),
    *("--model.config.intermediate_size", "14336"),
    *("--model.config.num_layers", "44"),
    *("--model.config.num_heads", "32"),
    *("--model.config.num_kv_heads", "8"),
]


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> list[str]:
    main(["estimate", *args])
    table, notes = capsys.readouterr().out.split("\n\n")
    assert notes.startswith("Released gradients exist one at a time")
    assert ("DDP keeps the gradients a second time" in notes) is ("--devices" in args)
    return table.splitlines()


def cells(lines: list[str]) -> dict[str, list[str]]:
    """The cells of a Markdown table by the first of each line."""
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {line[0]: line[1:] for line in split}


def test_the_readmes_table_of_ten_billion_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    table = cells(printed(capsys, *TEN_BILLION, "--markdown", "true"))
    assert table[""] == ["weights", "grads", "moments", "scales", "B/param", "10 B parameters, all"]
    assert table["fp32, AdamW"] == ["4.00", "4.00", "8.00", "0.00", "16.00", "160 GB"]
    assert table["bf16 weights and gradients, fp32 moments"][:5] == ["2.00", "2.00", "8.00", "0.00", "12.00"]
    *_, plain, total = table["bf16 weights and gradients, FP8AdamW"]
    assert float(plain) <= 6.1
    assert float(total.removesuffix(" GB")) <= 61
    release = table["the same with gradient release"]
    assert release[1] == "transient"
    assert float(release[4]) <= 4.1


def test_the_readme_holds_the_table_as_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, *TEN_BILLION, "--markdown", "true")
    assert "\n".join(lines[:-1]) in README.read_text()  # the last line is of the configuration


def test_a_configuration_with_gradient_release_is_without_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    lines = cells(printed(capsys, "-c", QUICKSTART, "--model.gradient_release", "true", "--markdown", "true"))
    assert lines["as configured"] == lines["the same with gradient release"]


def test_the_configuration_itself_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The quickstart is FP8AdamW on bf16 weights; the baseline torch's fused AdamW on fp32 ones."""
    lines = cells(printed(capsys, "-c", QUICKSTART, "--markdown", "true"))
    assert lines["as configured"] == lines["bf16 weights and gradients, FP8AdamW"]
    lines = cells(printed(capsys, "-c", QUICKSTART, "-c", BASELINE, "--markdown", "true"))
    assert lines["as configured"] == lines["fp32, AdamW"]
    command = ["-c", QUICKSTART, "--model.optimizer.moments", "fp32", "--markdown", "true"]
    lines = cells(printed(capsys, *command))
    assert lines["as configured"] == lines["bf16 weights and gradients, fp32 moments"]


def test_devices_share_under_fsdp_and_copy_under_ddp(capsys: pytest.CaptureFixture[str]) -> None:
    table = cells(printed(capsys, *TEN_BILLION, "--devices", "8", "--markdown", "true"))
    assert table[""][-2:] == ["10 B parameters, a device of DDP", "a device of 8, FSDP2"]
    assert table["fp32, AdamW"][-2:] == ["160 GB", "20 GB"]
    assert table["the same with gradient release"][-2:] == ["refused", "5.08 GB"]


def test_text_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys)
    assert len(lines) == 6
    assert len({len(line) for line in lines}) == 1


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["estimate", "--devices", "0"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "lightning-fp8: estimate: devices is 0; it must be 1 or more.\n"
    with pytest.raises(SystemExit) as stopped:
        main(["estimate", "--model.confg", "1"])
    assert stopped.value.code == 2


def forecast(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, list[str]]:
    """The cells of both tables of a prediction by the first of each line."""
    main(["estimate", "-c", QUICKSTART, *args])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("│", "┃"))]
    rows = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_a_step_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    """Llama-3-8B's width on eight H100s: DDP's copies do not fit, a shard of FSDP2's does."""
    wide = [*TEN_BILLION, "--data.sequence_length", "4096", "--data.batch_size", "1", "--devices", "8"]
    table = forecast(capsys, *wide, "--hardware", "h100")
    weights, grads, moments, copies, _, activations, total, share, most = table["FSDP2"]
    assert float(weights) == pytest.approx(2 * 9.997 / 8, abs=0.02)
    assert float(grads) == float(weights)
    assert float(moments) == pytest.approx(2.0625 * 9.997 / 8, abs=0.02)
    assert float(copies) == pytest.approx(2 * 4096 * 14336 / 1e9, abs=0.01)
    assert float(activations) > 10
    assert float(total) < 80 * 0.92
    assert int(most) >= 1
    assert share == f"{float(total) / 80:.0%}"
    assert table["DDP"][-2].endswith("too much")
    assert table["DDP"][-1] == "none fits"
    assert len(table["bf16"]) == 4
    gains = {name: float(table[name][2].split()[1].rstrip("x")) for name in ("tensorwise", "delayed", "rowwise_gw_hp")}
    assert gains["delayed"] > gains["tensorwise"] > gains["rowwise_gw_hp"] > 1
    assert "blockwise" in table  # Hopper's; MX is Blackwell's
    assert "mxfp8" not in table
    sent = [float(cell) for cell in table["GB sent a step"]]
    assert sent == pytest.approx([2 * 7 / 8 * 2 * 9.997, 2 * 7 / 8 * 9.997, 7 / 8 * 6 * 9.997, sent[3]], rel=1e-2)
    assert sent[1] < sent[3] < sent[2]


@pytest.mark.parametrize("length", ["128", "65536"])
def test_most_sequences_fit_and_one_more_does_not(capsys: pytest.CaptureFixture[str], length: str) -> None:
    size = ["--data.sequence_length", length, "--hardware", "rtx4090"]
    most = int(forecast(capsys, *size)["alone"][-1].replace(",", ""))
    assert "too much" not in forecast(capsys, *size, "--data.batch_size", str(most))["alone"][-2]
    assert "too much" in forecast(capsys, *size, "--data.batch_size", str(most + 1))["alone"][-2]


def test_one_device_sends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    table = forecast(capsys, "--hardware", "b200")
    assert len(table["bf16"]) == 1
    assert "mxfp8" in table
    assert "GB sent a step" not in table
    assert float(table["alone"][4]) == 0


def test_where_the_figures_come_from_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for name, fitted in (("b200", True), ("l40s", False)):
        main(["estimate", "-c", QUICKSTART, "--hardware", name])
        said = " ".join(capsys.readouterr().out.split())
        assert f"{ACCELERATORS[name].name}: {ACCELERATORS[name].source}" in said
        assert ("may be far slower" in said) is not fitted
