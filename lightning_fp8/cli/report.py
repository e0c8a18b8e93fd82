"""`lightning-fp8 report RUN`: one self-contained HTML page of a run."""

from pathlib import Path

from lightning_fp8.callbacks.page import read_run, write_page
from lightning_fp8.cli.parsers import call_from_command_line


def run(args: list[str]) -> None:
    """Writes the page for the options in `args`, the verb first."""
    call_from_command_line(report, args, positional=True)


def report(run: str, output: str | None = None, reference: str | None = None) -> None:
    """Writes one HTML page of a run: loss, worst layers, events, throughput, memory, configuration.

    Args:
        run: The run's folder; the run may be going on.
        output: Where the page goes; `report.html` in the run's folder if not given.
        reference: The folder of another run, such as the same in BF16, to whose loss the gap is shown.
    """
    path = Path(output) if output else Path(run) / "report.html"
    write_page(read_run(Path(run)), path, read_run(Path(reference)) if reference else None)
    print(path)
