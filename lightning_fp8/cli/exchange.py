"""`lightning-fp8 import` and `lightning-fp8 export`: to and from Hugging Face's layout."""

from lightning_fp8.checkpoint import export_checkpoint, import_checkpoint
from lightning_fp8.cli.parsers import call_from_command_line


def run(args: list[str]) -> None:
    """Runs the verb with the options in `args`, the verb first."""
    call_from_command_line(import_checkpoint if args[0] == "import" else export_checkpoint, args, positional=True)
