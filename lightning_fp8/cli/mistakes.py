"""What is wrong with an option, where it stands and what to write instead, out of what jsonargparse says of it.

jsonargparse tells all types that it has tried and no file. Here its message is read for the option and the reason, the
configuration files are searched for the option, and the nearest valid name is offered. What is not recognised (another
release words it otherwise) stays as it was, in its first and last line.
"""

import difflib
import importlib
import inspect
import re
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_UNKNOWN = re.compile(r"(?:accept option|Option) '([^']+)'|unrecognized arguments: (?:--)?([^\s=]+)")
_KEY = re.compile(r'^Parser key "([^"]+)"')
_VALUE = re.compile(r"(?:Got value|Given value): (.*)", re.DOTALL)
_LITERAL = re.compile(r"typing\.Literal\[(.*?)\]")
_TYPE = re.compile(r"Expected a <class '(?:[\w.]+\.)?(\w+)'>")
_NO_ATTRIBUTE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_NO_CLASS = re.compile(r"No module named '[^']+'|Import path [\w.]+ does not correspond to [^\n]+")
_DENIED = re.compile(r"Importing '([\w.]+)' is not allowed")
_OF_A_CLASS = ("class_path", "init_args", "dict_kwargs")


class Place(NamedTuple):
    """Where an option was given.

    Attributes:
        text: The file and the key, or the option of the command line.
        class_path: Of the class whose argument it is, if it is one's.
    """

    text: str
    class_path: str | None = None


def wrong_file(argv: Sequence[str]) -> str | None:
    """What is wrong with a configuration file of a command line: missing, no YAML, no mapping; None if nothing is."""
    for file in config_files(argv):
        path = Path(file)
        if not path.is_file():
            return f"--config {file}: there is no such file."
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            return f"{file} is not a text file (byte {error.start} is not UTF-8): give a YAML file."
        except OSError as error:
            return f"{file} cannot be read ({error.strerror}): give a YAML file that you may read."
        except RecursionError:
            return f"{file} nests too deeply: write a mapping of options."
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            at = f"{file}:{mark.line + 1}" if mark else file
            problem = getattr(error, "problem", None) or str(error).splitlines()[0]
            return f"{at}: {problem}: correct the YAML; tags that make objects are not read."
        if not isinstance(content, dict):
            return f"{file} holds no mapping of options: write lines such as `trainer: ...`."
        if wrong := [key for key in content if not isinstance(key, str)]:
            return f"{file}: {wrong[0]} is no name of an option: write lines such as `trainer: ...`."
    return None


def passed_over(parser: ArgumentParser, argv: Sequence[str]) -> str | None:
    """What is wrong with a key of which jsonargparse says nothing; None if nothing is.

    These are keys that there are not and whose value is `{}`, and keys of options with others below them, such as
    `trainer`, whose value is not a mapping of these (or the path of a file that is one).
    """
    options = set(_options(parser))
    for file in config_files(argv):
        for key, class_path, value in _keys(yaml.safe_load(Path(file).read_text(encoding="utf-8")), "", None):
            if value == {} and not _is_known(key, class_path, options):
                return _on_unknown(key.rpartition(".")[2] if class_path else key, parser, argv)
            if class_path or isinstance(value, dict) or not _has_parts(key, options):
                continue
            if not (isinstance(value, str) and Path(value).is_file()):
                below = next(option for option in _options(parser) if option.startswith(f"{key}."))
                first = f"{key} is {str(value)[:120]} (in {file}: {key})"
                return f"{first}\nIt must be a mapping of options such as {below}."
    return None


def _is_known(key: str, class_path: str | None, options: set[str]) -> bool:
    """Whether there is an option of this name, or one that may hold it; what it holds, a class or a type says."""
    if class_path:
        return key.rpartition(".")[2] in (*(known := _parameters(class_path)), *_OF_A_CLASS) or not known
    above = [key[:at] for at, letter in enumerate(key) if letter == "."]
    if any(one in options and not _has_parts(one, options) for one in above):
        return True
    return key in options or _has_parts(key, options)


def _has_parts(name: str, options: set[str]) -> bool:
    return any(option.startswith(f"{name}.") and option != f"{name}.help" for option in options)


def config_files(argv: Sequence[str]) -> Iterator[str]:
    """The values of `-c` and `--config`."""
    for at, arg in enumerate(argv):
        if arg in ("-c", "--config") and at + 1 < len(argv):
            yield argv[at + 1]
        elif arg.startswith("--config="):
            yield arg.removeprefix("--config=")


def explain(message: str, parser: ArgumentParser, argv: Sequence[str]) -> str:
    """At most three lines on what is wrong.

    Args:
        message: What jsonargparse says.
        parser: Whose options are valid.
        argv: The command line.
    """
    if denied := _DENIED.search(message):
        return (
            f"{denied[1]} is not among the trusted class paths{_at(_last_part(argv, denied[1]))}\n"
            "Add what it begins with to --trust_class_paths, if you trust it."
        )
    if unknown := _UNKNOWN.search(message):
        return _on_unknown(unknown[1] or unknown[2], parser, argv)
    if key := _KEY.match(message):
        return _on_value(key[1], message, argv)
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")] or ["wrong options"]
    return lines[0] if len(lines) == 1 else f"{lines[0]}\n{lines[-1]}"


def _on_unknown(name: str, parser: ArgumentParser, argv: Sequence[str]) -> str:
    place = next(places(name, argv), None)
    known = _parameters(place.class_path) if place and place.class_path else list(_options(parser))
    owner = f" of {place.class_path}" if place and place.class_path else ""
    first = f"{name} is not an option{owner}{_at(place)}"
    near = _nearest(name.removeprefix("--"), known) or _nearest(name.partition(".")[0], _OF_A_CLASS)
    return f"{first}\n{near or f'{parser.prog} --help lists the options.'}"


def _on_value(key: str, message: str, argv: Sequence[str]) -> str:
    found = _VALUE.search(message)
    value = " ".join(found[1].split()) if found else "?"
    first = f"{key} is {value[:120]}{_at(next(places(key, argv), None))}"
    if missing := _NO_ATTRIBUTE.search(message):
        return f"{first}\n{missing[1]} has no {missing[2]}. {_nearest(missing[2], _names(missing[1]))}".rstrip()
    if no_class := _NO_CLASS.search(message):
        return f"{first}\n{no_class[0]}: correct the class path."
    if choices := [part.strip("' ") for literal in _LITERAL.findall(message) for part in literal.split(",")]:
        choices = list(dict.fromkeys(choices))
        return f"{first}\nIt must be one of {', '.join(choices)}. {_nearest(value, choices)}".rstrip()
    if types := [name for name in dict.fromkeys(_TYPE.findall(message)) if name != "NoneType"]:
        finite = "a finite " if value.lower().strip("+-") in ("nan", "inf", ".nan", ".inf") else "of type "
        return f"{first}\nIt must be {finite}{' or '.join(types)}."
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    return f"{first}\n{lines[-1]}"


def places(name: str, argv: Sequence[str]) -> Iterator[Place]:
    """Where the option `name`, or one whose name ends so, is given: on the command line first, which has the last say.

    Args:
        name: A key; dotted, unless it is an argument of a class.
        argv: The command line.
    """
    options = {arg.split("=", 1)[0]: at for at, arg in enumerate(argv) if arg.startswith("--")}
    for option in reversed(options):
        key = option.removeprefix("--").rstrip("+")
        if key == name or key.endswith(f".{name}"):
            of = f"--{key.rpartition('.')[0]}"
            given = argv[options[of]].partition("=")[2] or argv[options[of] + 1] if of in options else None
            yield Place(option, given if given and "." in given and key != name else None)
    for file in reversed(list(config_files(argv))):
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        for key, class_path, _ in _keys(content, "", None):
            if key == name or key.endswith(f".{name}"):
                yield Place(f"{file}: {key}", class_path)


def _keys(content: Any, above: str, class_path: str | None) -> Iterator[tuple[str, str | None, Any]]:
    """All keys, dotted, with the class whose arguments they are, and their values."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield f"{above}{key}", class_path, value
        inner = content.get("class_path") if key == "init_args" else None
        yield from _keys(value, f"{above}{key}.", inner)


def _last_part(argv: Sequence[str], value: str) -> Place | None:
    return next((Place(arg) for arg in argv if value in arg), None) or next(places("class_path", argv), None)


def _at(place: Place | None) -> str:
    return f" (in {place.text})" if place else ""


def _options(parser: Any) -> Iterator[str]:
    """Names of the options of a parser and its verbs."""
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for inner in action.choices.values():
                yield from _options(inner)
        elif action.dest:
            yield action.dest


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):
        return []


def _names(module: str) -> list[str]:
    return [name for name in dir(importlib.import_module(module)) if not name.startswith("_")]


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(set(known)), 1)
    return f"Did you mean {near[0]!r}?" if near else ""
