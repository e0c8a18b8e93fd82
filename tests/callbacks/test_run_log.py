import csv
from pathlib import Path

import pytest
import torch

from lightning_fp8.callbacks import RunLog


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    return RunLog(str(tmp_path / "run"))


def on_disk(log: RunLog) -> list[dict[str, str]]:
    with log.file.open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_row_is_written_at_once(log: RunLog) -> None:
    for step in range(3):
        log.log_metrics({"loss": torch.tensor(1.5) + step}, step)
        assert on_disk(log) == [{"loss": str(1.5 + s), "step": str(s)} for s in range(step + 1)]
        assert log.rows() == on_disk(log)


def test_a_metric_that_comes_later_adds_a_column(log: RunLog) -> None:
    log.log_metrics({"loss": 1.0}, 0)
    log.log_metrics({"val": 3.0}, 1)
    log.log_metrics({"loss": 0.5}, 2)
    assert on_disk(log) == [
        {"loss": "1.0", "step": "0", "val": ""},
        {"loss": "", "step": "1", "val": "3.0"},
        {"loss": "0.5", "step": "2", "val": ""},
    ]


@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, [0, 1]), (5, [0, 1, 2, 3])])
def test_start_drops_what_came_after_the_checkpoint(log: RunLog, step: int, kept: list[int]) -> None:
    for row in range(4):
        log.log_metrics({"loss": 1.0}, row)
    resumed = RunLog(log.save_dir)
    resumed.start_at(step)
    resumed.log_metrics({"loss": 2.0}, step)
    assert [(int(row["step"]), row["loss"]) for row in on_disk(log)] == [*((k, "1.0") for k in kept), (step, "2.0")]


@pytest.mark.parametrize("starts", [True, False], ids=["started", "not started"])
def test_a_resumed_log_keeps_its_columns(log: RunLog, starts: bool) -> None:
    log.log_metrics({"loss": 1.0, "val": 2.0}, 0)
    resumed = RunLog(log.save_dir)
    if starts:
        resumed.start_at(1)
    resumed.log_metrics({"speed": 7.0}, 1)
    assert on_disk(log) == [
        {"loss": "1.0", "val": "2.0", "step": "0", "speed": ""},
        {"loss": "", "val": "", "step": "1", "speed": "7.0"},
    ]


@pytest.mark.parametrize("cut", range(1, 11))
def test_a_line_that_a_kill_cut_is_no_row(log: RunLog, cut: int) -> None:
    """Wherever it was cut: a step 1234 that reads as 12 would be worse than none."""
    log.log_metrics({"loss": 1.5}, 1233)
    whole = log.rows()
    log.log_metrics({"loss": 1.25}, 1234)
    log.file.write_bytes(log.file.read_bytes()[:-cut])
    assert log.rows() == whole
    resumed = RunLog(log.save_dir)
    resumed.start_at(1235)
    resumed.log_metrics({"loss": 2.5}, 1235)
    assert [row["step"] for row in on_disk(log)] == ["1233", "1235"]


ROW = {"epoch": 0, "loss": 0.1, "step": 2}


def test_the_row_of_a_checkpoint_is_written_if_it_is_missing(log: RunLog) -> None:
    for step in range(2):
        log.log_metrics({"epoch": 0, "loss": 1.0}, step)
    log.log_metrics({"val": 3.0}, 2)
    for _ in range(2):  # a run that is resumed twice has it once
        RunLog(log.save_dir).start_at(3, ROW)
        assert [(row["step"], row["loss"], row["val"]) for row in on_disk(log)] == [
            ("0", "1.0", ""),
            ("1", "1.0", ""),
            ("2", "", "3.0"),
            ("2", "0.1", ""),
        ]


def test_the_row_of_a_checkpoint_is_not_written_twice(log: RunLog) -> None:
    log.log_metrics({"epoch": 0, "loss": torch.tensor(0.1), "more": 2.0}, 2)
    RunLog(log.save_dir).start_at(3, ROW | {"loss": float(torch.tensor(0.1))})
    assert len(on_disk(log)) == 1


def test_an_absent_file_has_no_rows(log: RunLog) -> None:
    log.start_at(0)
    assert log.rows() == []
    assert not log.file.exists()


def test_the_run_folder_has_no_level_below_it(log: RunLog) -> None:
    """Lightning puts checkpoints into save_dir/name/version/checkpoints."""
    assert Path(log.save_dir, log.name, log.version) == Path(log.save_dir)
