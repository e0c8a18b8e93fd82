"""The `lightning-fp8` command: one verb, then its options.

Verbs are imported when they are called: `doctor` must run where `import lightning` fails, and `--help` must be quick.
A mistake of the user's or a failure of the machine ends in three lines at most and exit code 2 (usage) or 1 (failure);
`--debug` shows the traceback. So does a mistake of the program's own, which is said to be one.
"""

import errno
import importlib
import signal
import sys
import threading
import traceback
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
    "parity": ("lightning_fp8.cli.parity", "train a configuration in BF16 and FP8, paired, and compare the losses"),
    "sweep-lr": ("lightning_fp8.cli.sweep_lr", "loss against learning rate, in BF16 and FP8"),
    "plan": ("lightning_fp8.cli.plan", "which layers of a configuration run in FP8, and what that gains"),
    "estimate": ("lightning_fp8.cli.estimate", "memory of weights, gradients and optimizer state"),
    "completion": ("lightning_fp8.cli.completion", "what bash and zsh complete, to be loaded by them"),
    "doctor": ("lightning_fp8.cli.doctor", "check this machine and what is installed on it"),
}

_REMEDIES = {
    errno.ENOSPC: "make room, and go on with --ckpt_path last: the checkpoint before is whole",
    errno.EDQUOT: "make room, and go on with --ckpt_path last: the checkpoint before is whole",
    errno.EACCES: "give another path, or get the permission",
    errno.EPERM: "give another path, or get the permission",
    errno.EROFS: "give a path that can be written to",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; give another path",
    errno.EEXIST: "a file is there; give another path",
    errno.EISDIR: "it is a folder; give a file",
}
_NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed")  # torch's, of a CPU and of "meta"
_HEAD, _TAIL = 200, 80  # what is kept of a long line of a message: what is wrong, and the remedy


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
    interrupt = _FirstInterrupt()
    try:
        importlib.import_module(VERBS[args[0]][0]).run(args)
    except (KeyboardInterrupt, SystemExit):  # the Trainer makes one of the other
        if debug or not interrupt.came:
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # which outlives Python's own end, other than a handler
        _fail("interrupted. What was saved is whole: `fit` goes on with --ckpt_path last.", code=1)
    except Exception as error:
        if debug:
            raise
        _fail(_reason(error), code=1)


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


class _FirstInterrupt:
    """Lets Ctrl-C interrupt once: who presses it again does not want a traceback of how the program was ending."""

    def __init__(self) -> None:
        self.came = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *signal_and_frame: object) -> None:
        if not self.came:
            self.came = True
            raise KeyboardInterrupt


def _reason(error: Exception) -> str:
    """What went wrong, and what can be done about it."""
    if isinstance(error, OSError) and error.strerror:
        remedy = _REMEDIES.get(error.errno or 0, "")
        return f"{error.filename or 'The disk'}: {error.strerror.lower()}" + (f"; {remedy}." if remedy else ".")
    name = type(error).__name__
    if isinstance(error, ValueError | OSError) or name == "MisconfigurationException":
        return str(error)
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or any(map(str(error).__contains__, _NO_MEMORY)):
        return (
            "There is not enough memory: make the model, data.batch_size or data.sequence_length smaller;"
            " `lightning-fp8 estimate` says what they need."
        )
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "lightning_fp8" in frame.filename] or frames
    at = f" in {ours[-1].name}, {ours[-1].filename}:{ours[-1].lineno}" if ours else ""
    said = (str(error).splitlines() or [""])[0]
    return f"{name}: {said}\nThis was not foreseen{at}.\nPlease report it, with what --debug shows."


def _fail(message: str, code: int) -> NoReturn:
    lines = [line for line in message.splitlines() if line.strip()]
    print("lightning-fp8: " + "\n  ".join(map(_short, lines[:3])), file=sys.stderr)
    raise SystemExit(code)


def _short(line: str) -> str:
    return line if len(line) <= _HEAD + _TAIL else f"{line[:_HEAD]} … {line[-_TAIL:]}"
