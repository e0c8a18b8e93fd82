"""All twelve faults as one table: what each test claims, in the words that the tests themselves are held to."""

from collections.abc import Iterable

from faults import FAULTS
from judge import Row
from test_load_faults import CORRUPTED_SCALE
from test_rank_fault import BAD_RANK

# Of data there is nothing to train on: what is not all there is not opened.
TRUNCATED = Row(
    name="a data shard that is silently cut short",
    onset=0,
    detector="refused when opened",
    within=1,
    cure="none: it is told",
    test="data/test_truncated.py",
    breaks_loss=False,
)
ROWS: tuple[Row, ...] = (*FAULTS, BAD_RANK, CORRUPTED_SCALE, TRUNCATED)


def table(rows: Iterable[Row] = ROWS) -> str:
    """The rows in Markdown."""
    head = ("fault", "onset", "seen by", "within", "cure", "shown by, in `tests/`")
    lines = [head, ("---",) * len(head)]
    for row in rows:
        when = (f"step {row.onset}", f"{row.within} steps") if row.onset else ("when loaded", "before step 1")
        lines.append((row.name, when[0], row.detector, when[1], row.cure, f"`{row.test}`"))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
