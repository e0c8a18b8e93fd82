"""The `lightning-fp8` command: one verb, then its options.

Verbs are imported when they are called: `doctor` must run where `import lightning` fails, and `--help` must be quick.
A mistake of the user's ends in one line and exit code 2 (usage) or 1 (failure); `--debug` shows the traceback.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

VERBS = {
    "fit": ("lightning_fp8.cli.fit", "train a decoder from a configuration"),
    "validate": ("lightning_fp8.cli.fit", "loss, perplexity and bits per byte on held-out text"),
    "test": ("lightning_fp8.cli.fit", "the same, logged under test/"),
    "predict": ("lightning_fp8.cli.fit", "log-likelihood of every token of held-out text"),
    "prepare": ("lightning_fp8.cli.prepare", "turn text files into token chunks"),
    "generate": ("lightning_fp8.cli.generate", "continue a text from a checkpoint"),
    "import": ("lightning_fp8.cli.exchange", "turn a Hugging Face model into a checkpoint"),
    "export": ("lightning_fp8.cli.exchange", "write a checkpoint as a Hugging Face model"),
    "report": ("lightning_fp8.cli.report", "write one HTML page of a run"),
    "plan": ("lightning_fp8.cli.plan", "which layers of a configuration run in FP8, and what that gains"),
    "estimate": ("lightning_fp8.cli.estimate", "memory of weights, gradients and optimizer state"),
    "completion": ("lightning_fp8.cli.completion", "what bash and zsh complete, to be loaded by them"),
    "doctor": ("lightning_fp8.cli.doctor", "check this machine and what is installed on it"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the verb that `argv` (default: the command line) names."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return
    if args[0] == "--version":
        print(importlib.import_module("lightning_fp8").__version__)
        return
    if args[0] not in VERBS:
        _fail(f"there is no verb {args[0]!r}; the verbs are {', '.join(VERBS)}", code=2)
    try:
        importlib.import_module(VERBS[args[0]][0]).run(args)
    except (ValueError, OSError) as error:
        if debug:
            raise
        _fail(str(error), code=1)


def _overview() -> str:
    lines = [f"  {verb:12}{text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(
        [
            "usage: lightning-fp8 VERB [OPTIONS]",
            "",
            *lines,
            "",
            "lightning-fp8 VERB --help shows a verb's options.",
        ]
    )


def _fail(message: str, code: int) -> NoReturn:
    lines = [line for line in message.splitlines() if line.strip()]
    print("lightning-fp8: " + "\n  ".join(lines[:3]), file=sys.stderr)
    raise SystemExit(code)
