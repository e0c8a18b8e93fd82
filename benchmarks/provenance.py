"""From which commits the runs in a folder were made.

Runs go on where they were stopped, perhaps after a commit: that at which a page is written need not be the one at which
its figures were trained. So a commit is written down before it adds to a folder, where no kill can lose it, and taken
out again if it added nothing.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RECORD = "commits.json"


@contextmanager
def recorded(folder: Path, machine: Mapping[str, Any]) -> Iterator[None]:
    """Notes in `folder` the commit of `machine`, if what is done within adds files there.

    Args:
        folder: Is made.
        machine: As `measuring.machine` has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, before, known = folder / RECORD, _names(folder), commits(folder)
    commit = machine["commit"][:12] + (" with uncommitted changes" if machine["changed"] else "")
    file.write_text(json.dumps([*(one for one in known if one != commit), commit]))
    yield
    if _names(folder) == before:
        file.write_text(json.dumps(known))


def commits(folder: Path) -> list[str]:
    """Those that have added to it, the latest last."""
    file = folder / RECORD
    return list(json.loads(file.read_text())) if file.exists() else []


def _names(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.name != RECORD}
