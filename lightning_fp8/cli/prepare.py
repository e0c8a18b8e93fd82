"""`lightning-fp8 prepare`: text -> tokenizer -> token chunks."""

from lightning_fp8.cli.parsers import call_from_command_line
from lightning_fp8.data.prepare import prepare


def run(args: list[str]) -> None:
    """Runs `prepare` with the options in `args`, the verb first."""
    call_from_command_line(prepare, args)
