"""What a configuration or a checkpoint from somebody else may make this process run: nothing but what is trusted.

A class path in a configuration is an import, and an import runs code. `--trust_class_paths lightning,torch` (or the
environment variable, for jobs whose command line is made by others) refuses all class paths that begin with none of
these names. It is read before any configuration file and cannot be set in one.

A checkpoint may hold a pickle, which is a program. torch loads tensors and plain values only if it is told to, which
not everything between us and it does: the folder of a sharded checkpoint is read with `weights_only=False`.
"""

import os
from collections.abc import Sequence

import jsonargparse

OPTION = "--trust_class_paths"
VARIABLE = "LIGHTNING_FP8_TRUST_CLASS_PATHS"


def restrict_class_paths(argv: Sequence[str]) -> list[str]:
    """Takes the option out of a command line and has the parsers refuse other class paths from now on.

    Args:
        argv: The command line, the program's name first.

    Returns:
        The rest of it.

    Raises:
        ValueError: The option has no value, or jsonargparse is too old to refuse class paths.
    """
    rest, trusted = [], os.environ.get(VARIABLE)
    args = iter(argv)
    for arg in args:
        name, equals, value = arg.partition("=")
        if name == OPTION:
            trusted = value if equals else next(args, "")
        else:
            rest.append(arg)
    if trusted is None:
        return rest
    names = [name.strip() for name in trusted.split(",") if name.strip()]
    if not names or not all(part.isidentifier() for name in names for part in name.split(".")):
        raise ValueError(f"{OPTION} is {trusted!r}: give names of packages or modules, such as lightning_fp8,torch.")
    jsonargparse.set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=names)
    return rest


def load_tensors_only() -> None:
    """Has every `torch.load` of this process and its children refuse programs, whatever its caller asks for."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
