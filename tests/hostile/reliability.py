"""Writes the README's reliability table from what the tests report: `python tests/hostile/reliability.py`.

It runs them, the slow ones too, and counts what passed: a row whose tests failed, were left out or did not run says so.
The table goes between two marks in README.md, and nowhere if there are none.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent.parent
BEGIN, END = "<!-- reliability: make reliability -->", "<!-- end of reliability -->"


class Row(NamedTuple):
    """A line of the table: what was tried, in which tests, and what it has to cost."""

    what: str
    tests: str  # of the names, a regular expression
    outcome: str


ROWS = [
    Row("wrong options, files and folders", r"test_a_mistake_is_told|test_the_process_ends_so", "three lines at most"),
    Row("full disk while saving, logging, preparing", r"without_room|small_disk", "0 bytes lost"),
    Row("SIGKILL at a random moment, then resume", r"test_a_kill_at_any_moment", "0 bits differ"),
    Row("SIGTERM, Ctrl-C twice", r"sigterm|ctrl_c", "saved, or the last save kept"),
    Row("damaged newest checkpoint", r"test_the_checkpoint_before", "the one before is used"),
    Row("files of others, fuzzed", r"test_fuzz", "refused or read"),
    Row("orders of step, save, load, convert, restore", r"test_state_machine", "0 bits differ"),
    Row("10,000 steps; two runs at once", r"test_resources", "nothing grows or meets"),
    Row("builds, an empty environment", r"test_supply_chain", "the same bytes"),
]


def table(report: Path) -> str:
    """The table of a JUnit report."""
    results: dict[str, list[bool]] = {row.what: [] for row in ROWS}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        passed = not any(case.find(what) is not None for what in ("failure", "error", "skipped"))
        for row in ROWS:
            if re.search(row.tests, name):
                results[row.what].append(passed)
    lines = ["| tried | tests | survived | what it costs |", "|---|---:|---:|---|"]
    for row in ROWS:
        tried, passed = len(results[row.what]), sum(results[row.what])
        outcome = row.outcome if tried and passed == tried else "**not shown**"
        lines.append(f"| {row.what} | {tried} | {passed} | {outcome} |")
    return "\n".join(lines)


def place(text: str, made: str) -> str:
    """`text` with the table between its marks.

    Raises:
        ValueError: It has no marks.
    """
    begin, end = text.find(BEGIN), text.find(END)
    if not 0 <= begin < end:
        raise ValueError(f"README.md has no marks: put {BEGIN} and {END} where the table is to be.")
    return f"{text[: begin + len(BEGIN)]}\n{made}\n{text[end:]}"


def main() -> None:
    """Runs the tests and puts the table in place."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        tests = ["tests/test_bad_input.py", "tests/hostile"]
        command = [sys.executable, "-m", "pytest", "-q", *tests, "-m", "not gpu", f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, check=False)
        made = table(report)
    print(made)
    readme = ROOT / "README.md"
    readme.write_text(place(readme.read_text(), made))


if __name__ == "__main__":
    main()
