"""Parsers that say what is wrong with an option in one or two lines instead of printing the whole usage."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli
from lightning.pytorch.cli import LightningArgumentParser

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


class OneLineErrors(ArgumentParser):
    """An argument parser with short errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the first and the last line of `message`, where jsonargparse says what and why; exits with 2."""
        lines = [line.strip(" -") for line in str(message).splitlines() if line.strip(" -")] or ["wrong options"]
        text = lines[0] if len(lines) == 1 else f"{lines[0]}\n  {lines[-1]}"
        sys.stderr.write(f"lightning-fp8: {text}\n")
        raise SystemExit(2)


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
    auto_cli(function, args=options, prog=f"lightning-fp8 {verb}", as_positional=positional, parser_class=OneLineErrors)
