"""Parsers that say what is wrong with an option in one or two lines instead of printing the whole usage."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli
from lightning.pytorch.cli import LightningArgumentParser

from lightning_fp8.cli.mistakes import explain, passed_over, wrong_file

# What jsonargparse says of a value for each type that it is not meant to be.
_OF_OTHER_TYPES = (
    "Import path ",
    "Not a valid subclass ",
    "Expected a ",
    "Does not validate ",
    "a class path ",
    "a dict ",
)


def reason(message: str) -> str:
    """What a class said of its arguments, out of all that jsonargparse prints of the types which it has tried."""
    if "Union subtypes" not in message:
        return message
    said = (line.strip().removeprefix("- ") for line in message.splitlines() if line.strip().startswith("- "))
    return next((line for line in said if not line.startswith(_OF_OTHER_TYPES)), message)


def refuse(message: str) -> NoReturn:
    """Prints what is wrong with the use of the program, in three lines at most; exits with 2."""
    sys.stderr.write("lightning-fp8: " + "\n  ".join(message.splitlines()[:3]) + "\n")
    raise SystemExit(2)


class OneLineErrors(ArgumentParser):
    """An argument parser with short errors."""

    def parse_args(self, args: Any = None, *further: Any, **options: Any) -> Any:
        """Parses; what jsonargparse passes over in a file is an error, too."""
        if complaint := passed_over(self, sys.argv[1:] if args is None else args):
            refuse(complaint)
        return super().parse_args(args, *further, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints what is wrong, where, and what is right; exits with 2."""
        refuse(explain(str(message), self, sys.argv))


class FitParser(OneLineErrors, LightningArgumentParser):
    """The parser of LightningCLI with short errors."""


def call_from_command_line(function: Callable[..., Any], args: list[str], *, positional: bool = False) -> None:
    """Calls `function` with the options in `args`, the verb first; `-c` and `--config` read them from YAML.

    Args:
        function: Its parameters are the options.
        args: The command line.
        positional: Parameters without a default are given by their place, not by name.
    """
    verb, *options = ("--config" if arg == "-c" else arg for arg in args)  # as LightningCLI has it
    if complaint := wrong_file(options):
        refuse(complaint)
    sys.argv = [f"lightning-fp8 {verb}", *options]
    auto_cli(function, args=options, prog=f"lightning-fp8 {verb}", as_positional=positional, parser_class=OneLineErrors)
