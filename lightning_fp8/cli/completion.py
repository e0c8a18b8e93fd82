"""`lightning-fp8 completion`: what a shell completes, from the parsers themselves.

Printed once and loaded by the shell, since asking the command at every press of a key would import torch each time:

    lightning-fp8 completion > ~/.lightning-fp8-completion && echo 'source ~/.lightning-fp8-completion' >> ~/.bashrc

Verbs, then the options of the verb, then files. In zsh `autoload -U bashcompinit && bashcompinit` comes first.
"""

import argparse
import importlib
import sys
from collections.abc import Mapping
from typing import cast

from jsonargparse import capture_parser

_WITHOUT_OPTIONS = ("doctor", "completion")
_SCRIPT = """\
_lightning_fp8() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" options=""
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{verbs}" -- "$current"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    case "$current" in
        -*) COMPREPLY=($(compgen -W "$options" -- "$current")) ;;
        *) COMPREPLY=($(compgen -f -- "$current")) ;;
    esac
}}
complete -F _lightning_fp8 lightning-fp8
"""


def run(args: list[str]) -> None:
    """Prints the script; there are no options."""
    if len(args) > 1:
        raise ValueError(f"completion takes no options, and got {' '.join(args[1:])}.")
    print(script(options_of_all()), end="")


def options_of_all() -> dict[str, list[str]]:
    """The options of every verb, in the order of `--help`."""
    from lightning_fp8.cli.main import VERBS

    return {verb: [] if verb in _WITHOUT_OPTIONS else options_of(verb, VERBS[verb][0]) for verb in VERBS}


def script(options: Mapping[str, list[str]]) -> str:
    """The completion of bash.

    Args:
        options: Of each verb.
    """
    cases = "\n".join(f'        {verb}) options="{" ".join(names)}" ;;' for verb, names in options.items())
    return _SCRIPT.format(verbs=" ".join(options), cases=cases)


def options_of(verb: str, module: str) -> list[str]:
    """The options that a verb's own parser has."""
    names = {name for action in parser_of(verb, module)._actions for name in action.option_strings}
    return sorted(name for name in names if name.startswith("--"))


def parser_of(verb: str, module: str) -> argparse.ArgumentParser:
    """What parses the options of a verb.

    Args:
        verb: Its name.
        module: Where it is: its `options` makes the parser, or its `run` has jsonargparse make one.
    """
    home = importlib.import_module(module)
    if hasattr(home, "options"):
        made: argparse.ArgumentParser = home.options()
        return made
    before = sys.argv
    try:
        parser: argparse.ArgumentParser = capture_parser(lambda: home.run([verb]))
    finally:
        sys.argv = before  # LightningCLI reads it, so verbs set it
    for action in parser._actions:
        if isinstance(action.choices, dict) and verb in action.choices:  # LightningCLI's verbs are subcommands
            return cast(argparse.ArgumentParser, action.choices[verb])
    return parser
