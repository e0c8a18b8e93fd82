from pathlib import Path

import pytest
from hostile.reliability import BEGIN, END, ROWS, place, table

CASE = '<testcase classname="tests.test_bad_input" name="test_a_mistake_is_told[{0}]">{1}</testcase>'


def report(tmp_path: Path, *inner: str) -> str:
    cases = "".join(CASE.format(i, text) for i, text in enumerate(inner))
    (tmp_path / "report.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    return table(tmp_path / "report.xml")


def test_counts_are_those_of_the_report(tmp_path: Path) -> None:
    assert f"| {ROWS[0].what} | 3 | 3 | three lines at most |" in report(tmp_path, "", "", "")


@pytest.mark.parametrize("inner", ["<failure/>", "<error/>", "<skipped/>"])
def test_what_did_not_pass_is_not_claimed(inner: str, tmp_path: Path) -> None:
    assert f"| {ROWS[0].what} | 2 | 1 | **not shown** |" in report(tmp_path, "", inner)
    assert f"| {ROWS[2].what} | 0 | 0 | **not shown** |" in report(tmp_path, "")


def test_the_table_takes_its_place() -> None:
    assert place(f"a\n{BEGIN}\nold\n{END}\nb", "new") == f"a\n{BEGIN}\nnew\n{END}\nb"
    with pytest.raises(ValueError, match="no marks"):
        place("a", "new")
