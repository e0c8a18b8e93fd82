"""`lightning-fp8 parity`: trains paired arms of a configuration, or takes runs there are, and says what can be said."""

import argparse
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from lightning_fp8.cli.comparison import ShortErrors, check, configuration, parser
from lightning_fp8.parity import arms as table
from lightning_fp8.parity.compare import Comparison, compare
from lightning_fp8.parity.outcome import pairing, read_outcome
from lightning_fp8.parity.report import markdown, write
from lightning_fp8.parity.run import run as carry_out
from lightning_fp8.parity.statistics import BAR
from lightning_fp8.parity.trials import trial

DESCRIPTION = """\
Does FP8 learn as BF16 does, with this configuration? Trains the arms with the same seeds, weights and data, and
compares their losses, pair by pair. The first arm is the reference. Call again to go on after a kill.

Exit code: 0 at parity or better, 1 if not or if it cannot be told, 2 of a wrong option.

arms:
""" + "\n".join(f"  {arm.name:18}{arm.about}" for arm in table.ARMS.values())


def options() -> ShortErrors:
    """The options of the verb."""
    made = parser("parity", DESCRIPTION, "runs/parity")
    made.add_argument("--bar", type=float, default=100 * BAR, help="percent; gaps within are parity (%(default)s)")
    made.add_argument("--no-control", action="store_true", help="leave out the dead-block control")
    made.add_argument(
        "--runs",
        nargs="+",
        metavar="ARM=FOLDER,FOLDER",
        help="folders of runs that are there, instead of training; in each arm in the same order of seeds",
    )
    return made


def run(args: list[str]) -> None:
    """Compares, for the options in `args`, the verb first."""
    given, of_fit = options().parse_known_args(args[1:])
    if not 0 < given.bar < math.inf:
        raise ValueError(f"--bar {given.bar} is a percentage above 0.")
    comparison = logged(given) if given.runs else trained(given, of_fit)
    print(markdown(write(comparison, given.output, shlex.join(["lightning-fp8", *args]))))
    print(given.output / "parity.html")
    if not comparison.passed:
        raise SystemExit(1)


def trained(given: argparse.Namespace, of_fit: Sequence[str]) -> Comparison:
    """The comparison of runs that are trained, or go on, now."""
    check(given)
    arms = table.choose(given.arms)
    if len(arms) < 2:
        raise ValueError("--arms needs the reference and at least one more.")
    control = None if given.no_control else table.CONTROL
    if control and control not in given.arms:
        arms.append(table.ARMS[control])
    configs = {arm.name: configuration(given.config, arm, of_fit) for arm in arms}
    return compared(arms, configs, given.seeds, given.output, given.steps, given.jobs, control, given.bar / 100)


def compared(
    arms: Sequence[table.Arm],
    configs: dict[str, dict[str, object]],
    seeds: Sequence[int],
    output: Path,
    steps: int | None,
    jobs: int,
    control: str | None,
    bar: float,
) -> Comparison:
    """Trains each arm's configuration with each seed, seed by seed, and compares them with the first arm."""
    trials = {
        (arm.name, seed): trial(arm.name, configs[arm.name], seed, output / "trials", steps=steps)
        for seed in seeds
        for arm in arms
    }
    failures = carry_out(list(trials.values()), jobs=jobs)
    outcomes = {
        arm.name: {
            seed: read_outcome(one.place) for seed in seeds if (one := trials[arm.name, seed]).name not in failures
        }
        for arm in arms
    }
    abouts = {arm.name: arm.about for arm in arms}
    return compare(outcomes, abouts, seeds, control=control, bar=bar, failures=failures)


def logged(given: argparse.Namespace) -> Comparison:
    """The comparison of runs that are there.

    Raises:
        ValueError: The runs are no pairs.
    """
    folders = dict(_arm_and_folders(text) for text in given.runs)
    names = list(folders)
    if len(names) < 2 or len(names) < len(given.runs) or len({len(found) for found in folders.values()}) > 1:
        raise ValueError("--runs needs two arms or more with different names, and of each as many folders.")
    outcomes = {name: dict(enumerate(map(read_outcome, found))) for name, found in folders.items()}
    for name in names[1:]:
        for number, one in outcomes[name].items():
            wanted, found = pairing(outcomes[names[0]][number]), pairing(one)
            if wrong := [key for key in wanted if wanted[key] != found[key]]:
                raise ValueError(
                    f"{folders[name][number]} and {folders[names[0]][number]} are no pair: their {', '.join(wrong)}"
                    " differ."
                )
    abouts = {name: ", ".join(map(str, found)) for name, found in folders.items()}
    control = table.CONTROL if table.CONTROL in names[1:] and not given.no_control else None
    seeds = list(outcomes[names[0]])
    return compare(outcomes, abouts, seeds, control=control, bar=given.bar / 100)


def _arm_and_folders(text: str) -> tuple[str, list[Path]]:
    name, equals, folders = text.partition("=")
    if not (name and equals and folders):
        raise ValueError(f"--runs {text!r} is not ARM=FOLDER,FOLDER.")
    return name, [Path(folder) for folder in folders.split(",")]
