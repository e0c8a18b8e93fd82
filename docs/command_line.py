"""The page `command-line.md`, written from the parsers themselves each time the pages are built.

A hook of MkDocs: `on_files` adds the page. It asks each verb for the parser that it makes, so
an option cannot be missing here, or be described otherwise than by `--help`. `plan` and `estimate` take what `fit`
takes and show what they add; so do `validate`, `test` and `predict`.
"""

import argparse
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from lightning_fp8.cli.completion import parser_of
from lightning_fp8.cli.main import VERBS

PAGE = "command-line.md"
LIKE_FIT = ("validate", "test", "predict", "plan", "estimate")
NO_OPTIONS = ("completion", "doctor")

# How jsonargparse ends the help of an option.
_ENDING = re.compile(
    r"\s*\((?P<required>required, )?type: (?P<type>.*?)(?:, default: (?P<default>.*?))?(?:, known subclasses: .*)?\)$",
    re.DOTALL,
)
_EVERYWHERE = ("help", "print_config", "config")

# Markup of Sphinx in the docstrings of Lightning.
_ROLE = re.compile(r":\w+:`~?([^`]+)`")

INTRODUCTION = """# Command line

`lightning-fp8 VERB`, then the verb's options. Every verb takes `-c FILE`, a YAML file with its options, several times:
later files and options overlay earlier ones. `--print_config` prints what they amount to and does nothing else,
`--help` explains the options, and `--debug` shows the traceback of an error.

A mistake in the options ends with exit code 2, a failure with 1, either with a message of one to three lines.
"""


class Option(NamedTuple):
    """One option, as `--help` has it."""

    name: str
    type: str
    default: str
    meaning: str


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page to those of the site."""
    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """The page's Markdown."""
    parsers = {verb: parser_of(verb, module) for verb, (module, _) in VERBS.items() if verb not in NO_OPTIONS}
    shared = {option.name for _, options in groups(parsers["fit"]) for option in options}
    return "\n".join([INTRODUCTION, *(section for verb in VERBS for section in _verb(verb, parsers.get(verb), shared))])


def groups(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[Option]]]:
    """The titles of the option groups of `parser`, each with its options; those without options are left out."""
    formatter: Any = parser.formatter_class(prog=parser.prog)
    ours_first = sorted(parser._action_groups, key=lambda group: "via flags" in (group.title or ""))
    for group in ours_first:
        actions = [action for action in group._group_actions if action.dest not in _EVERYWHERE]
        options = [_option(action, formatter) for action in actions if not action.dest.endswith(".help")]
        options = [option for option in options if option.meaning != "Path to a configuration file."]
        if options:
            yield group.title or "", options


def _option(action: argparse.Action, formatter: Any) -> Option:
    text = _ROLE.sub(r"`\1`", " ".join(formatter._expand_help(action).split()).replace("``", "`"))
    ending = _ENDING.search(text)
    name = next((name for name in action.option_strings if name.startswith("--")), action.dest)
    if ending is None:
        return Option(name, "", "", text)
    return Option(
        name, ending["type"], "required" if ending["required"] else ending["default"] or "", text[: ending.start()]
    )


def _verb(verb: str, parser: argparse.ArgumentParser | None, shared: set[str]) -> Iterator[str]:
    yield f"\n## {verb}\n\n{VERBS[verb][1].capitalize()}.\n"
    if parser is None:
        yield "It has no options."
        return
    if verb in LIKE_FIT:
        yield "It takes the options of [`fit`](#fit)" + (
            ", and these:\n" if any(_new(options, shared) for _, options in groups(parser)) else ".\n"
        )
    for title, options in groups(parser):
        chosen = _new(options, shared) if verb in LIKE_FIT else options
        if chosen:
            if title not in ("options", "positional arguments"):
                yield f"\n**{title}**\n"
            yield from _definitions(chosen)


def _new(options: Iterable[Option], shared: set[str]) -> list[Option]:
    return [option for option in options if option.name not in shared]


def _definitions(options: Iterable[Option]) -> Iterator[str]:
    for option in options:
        default = f"default `{option.default}`" if option.default not in ("", "required") else option.default
        facts = ", ".join(fact for fact in (f"`{option.type}`" if option.type else "", default) if fact)
        yield f"`{option.name}`{f' · {facts}' if facts else ''}\n:   {option.meaning.replace('<', '&lt;')}\n"
