"""`lightning-fp8 sweep-lr`: the loss of each arm over learning rates, and how sensitive to them it is."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_fp8.cli.comparison import ShortErrors, check, configuration, parser
from lightning_fp8.parity.arms import choose
from lightning_fp8.parity.outcome import read_outcome
from lightning_fp8.parity.run import run as carry_out
from lightning_fp8.parity.sweep import DECADES, Sweep, markdown, rates_around, write
from lightning_fp8.parity.trials import Config, Trial, learning_rate, trial

DESCRIPTION = """\
Does FP8 make the learning rate matter more? Trains each arm at rates over three decades around the configuration's,
and gives the loss at each and the sensitivity: how much a wrong rate costs on average, in nats. Call again to go on
after a kill.
"""


def options() -> ShortErrors:
    """The options of the verb."""
    made = parser("sweep-lr", DESCRIPTION, "runs/sweep-lr")
    made.add_argument("--rates", type=float, nargs="+", help="at even distances on a log scale, instead of --count")
    made.add_argument("--count", type=int, default=7, help=f"rates over {DECADES:g} decades (default: 7)")
    made.set_defaults(seeds=[0])
    return made


def run(args: list[str]) -> None:
    """Sweeps, for the options in `args`, the verb first."""
    given, of_fit = options().parse_known_args(args[1:])
    check(given)
    rates = given.rates or []
    if given.rates and (len(rates) < 2 or len(set(rates)) < len(rates) or not all(0 < r < math.inf for r in rates)):
        raise ValueError("--rates needs two learning rates or more: different, finite, and above 0.")
    arms = choose(given.arms)
    configs = {arm.name: configuration(given.config, arm, of_fit) for arm in arms}
    rates = sorted(given.rates) if given.rates else rates_around(learning_rate(configs[arms[0].name]), given.count)
    sweep = swept(configs, rates, given.seeds, given.output, given.steps, given.jobs)
    print(markdown(write(sweep, given.output, shlex.join(["lightning-fp8", *args]))))
    print(given.output / "sweep.html")
    if sweep.failures:
        raise SystemExit(1)


def swept(
    configs: Mapping[str, Config],
    rates: Sequence[float],
    seeds: Sequence[int],
    output: Path,
    steps: int | None,
    jobs: int,
) -> Sweep:
    """Trains each arm's configuration at each rate with each seed; arms take turns, so an early look shows all."""
    trials = [
        trial(arm, config, seed, output / "trials", steps=steps, rate=rate)
        for seed in seeds
        for rate in rates
        for arm, config in configs.items()
    ]
    failures = carry_out(trials, jobs=jobs)
    done = [one for one in trials if one.name not in failures]
    losses = {arm: {rate: _losses(done, arm, rate) for rate in rates} for arm in configs}
    vocabulary = next(iter(configs.values()))["model"]["config"]["vocab_size"]
    return Sweep(rates, seeds, losses, math.log(vocabulary), failures)


def _losses(done: list[Trial], arm: str, rate: float) -> dict[int, float]:
    return {one.seed: read_outcome(one.place).loss for one in done if (one.arm, one.rate) == (arm, rate)}
