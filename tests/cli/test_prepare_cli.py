import json
from pathlib import Path

import pytest

from lightning_fp8.cli.main import main


@pytest.mark.parametrize("flag", ["-c", "--config"])
def test_options_come_from_yaml_and_the_command_line(flag: str, tmp_path: Path) -> None:
    for i in range(16):
        (tmp_path / f"{i}.txt").write_text(f"{i} few words")
    (tmp_path / "x.yaml").write_text(
        f"sources: [{tmp_path}]\noutput_dir: {tmp_path}/data\nval_fraction: 0.5\nseed: 1\n"
    )
    main(["prepare", flag, str(tmp_path / "x.yaml"), "--vocab_size", "260"])
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    assert (manifest["vocab_size"], manifest["seed"]) == (260, 1)


@pytest.mark.parametrize("written", ["{}", "[{}]"])
def test_one_source_needs_no_brackets(written: str, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(16):
        (tmp_path / f"text/{i}.txt").write_text(f"{i} few words")
    options = ["--val_fraction", "0.5", "--seed", "1", "--vocab_size", "260", "--workers", "1"]
    main(["prepare", "--sources", written.format(tmp_path / "text"), "--output_dir", str(tmp_path / "data"), *options])
    assert json.loads((tmp_path / "data/manifest.json").read_text())["sources"] == [str(tmp_path / "text")]


def test_a_misspelt_option_is_told_briefly(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", "--souces", "x"])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("lightning-fp8: ")
    assert len(lines) <= 3
    assert any("souces" in line for line in lines)
    assert "sources" in lines[-1]
