"""`lightning-fp8 prepare`: text -> tokenizer -> token chunks."""

from jsonargparse import auto_cli

from lightning_fp8.cli.parsers import OneLineErrors
from lightning_fp8.data.prepare import prepare


def run(args: list[str]) -> None:
    """Runs `prepare` with the options in `args`, the verb first."""
    auto_cli(prepare, args=args[1:], prog="lightning-fp8 prepare", as_positional=False, parser_class=OneLineErrors)
