"""What `parity` and `sweep-lr` share: their options, and whole configurations of their arms."""

import argparse
import io
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import NoReturn

import yaml

from lightning_fp8.cli.fit import FP8CLI, start
from lightning_fp8.parity.arms import DEFAULT, Arm
from lightning_fp8.parity.trials import Config

_SEEDS = 2**32  # as many as numpy takes


class ShortErrors(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message; exits with 2."""
        sys.stderr.write(f"lightning-fp8: {message}\n")
        raise SystemExit(2)


def parser(verb: str, description: str, output: str) -> ShortErrors:
    """A parser with the options of both verbs."""
    made = ShortErrors(
        prog=f"lightning-fp8 {verb}",
        description=description,
        epilog="Options of `fit`, such as --trainer.limit_val_batches=5, hold for all arms.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("-c", "--config", action="append", default=[], metavar="FILE", help="of `fit`; several merge")
    made.add_argument("--arms", nargs="+", default=list(DEFAULT), metavar="ARM", help="names, or NAME=overlay.yaml")
    made.add_argument("--steps", type=int, help="optimizer steps of each run (default: the configuration's)")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights and data (default: 0 1 2)")
    made.add_argument("--output", type=Path, default=Path(output), help=f"the folder of it all (default: {output})")
    made.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1; more blur the speeds)")
    return made


def check(args: argparse.Namespace) -> None:
    """Refuses options that no parser can.

    Raises:
        ValueError: There is no configuration, a seed is none or comes twice, or there are no jobs.
    """
    if not args.config:
        raise ValueError("Give the configuration to compare with, as for `fit`: -c configs/quickstart.yaml.")
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, args.seeds))} has one more than once.")
    if not all(0 <= seed < _SEEDS for seed in args.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, args.seeds))} must be from 0 to {_SEEDS - 1}.")
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs} must be 1 or more.")


def configuration(files: Sequence[str], arm: Arm, options: Sequence[str]) -> Config:
    """The whole configuration of an arm, as `fit --print_config` has it.

    Args:
        files: The user's.
        arm: Its overlay goes over them.
        options: Of `fit`, over all.

    Raises:
        SystemExit: `fit` does not take it, and has said why; the code is its own.
    """
    with tempfile.NamedTemporaryFile("w", suffix=f"-{arm.name}.yaml") as overlay:
        yaml.safe_dump(dict(arm.overlay), overlay)
        overlay.flush()
        given = [word for file in [*files, overlay.name] for word in ("--config", file)]
        printed = io.StringIO()
        try:
            with redirect_stdout(printed):
                start(FP8CLI, ["lightning-fp8", "fit", *given, *options, "--print_config"])
        except SystemExit as stopped:
            if stopped.code:
                sys.stderr.write(
                    f"lightning-fp8: The arm {arm.name!r} is no configuration of `fit`, for the reason above.\n"
                )
                raise
    config: Config = yaml.safe_load(printed.getvalue())
    return config
