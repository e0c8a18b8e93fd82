"""Which commits the evidence names."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from provenance import commits, recorded


def at(commit: str, changed: bool = False) -> dict[str, object]:
    return {"commit": commit * 40, "changed": changed}


def test_a_commit_that_adds_nothing_is_not_named(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    with recorded(folder, at("a")):
        (folder / "bf16-0.done").touch()
    with recorded(folder, at("b")):
        (folder / "bf16-0.done").touch()
    assert commits(folder) == ["a" * 12]


def test_all_that_add_are_named_the_latest_last_and_changes_are_told(tmp_path: Path) -> None:
    for commit, changed in (("a", False), ("b", True), ("a", False)):
        with recorded(tmp_path, at(commit, changed)):
            (tmp_path / f"{len(list(tmp_path.iterdir()))}.done").touch()
    assert commits(tmp_path) == ["b" * 12 + " with uncommitted changes", "a" * 12]


def interrupted(folder: Path) -> None:
    with recorded(folder, at("a")):
        (folder / "bf16-0.done").touch()
        raise KeyboardInterrupt


def test_a_kill_loses_no_commit(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path)
    with recorded(tmp_path, at("b")):
        pass
    assert commits(tmp_path) == ["a" * 12]
