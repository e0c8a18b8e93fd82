"""The project's evidence: paired comparisons, sweeps and ledgers, from which docs/evidence.md is made.

    python benchmarks/evidence.py                     # `make evidence`: under an hour on two cores
    python benchmarks/evidence.py --profile full      # `make evidence-full`: hours; what is committed
    python benchmarks/evidence.py --profile gpu       # on a machine with FP8 GEMMs: 26 M and 150 M parameters
    python benchmarks/evidence.py --only moments      # one section

What runs is `lightning-fp8 parity` and `sweep-lr`, called as functions. Runs lie in runs/evidence and go on where they
were stopped; the figures, with machine and commit, go to benchmarks/results/evidence; no number is written by hand.
"""

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence_faults import measure_faults
from evidence_page import write_page
from measuring import machine
from provenance import commits, recorded

from lightning_fp8.cli.comparison import configuration
from lightning_fp8.cli.parity import compared
from lightning_fp8.cli.sweep_lr import swept
from lightning_fp8.data import prepare
from lightning_fp8.data.spelled import spelling
from lightning_fp8.parity import report, sweep
from lightning_fp8.parity.arms import ARMS, CONTROL, Arm
from lightning_fp8.parity.statistics import BAR
from lightning_fp8.parity.trials import learning_rate

RESULTS = Path("benchmarks/results/evidence")
SKIPS, RARE = "configs/evidence/skip-bigram.yaml", "configs/evidence/zipf.yaml"
QUICKSTART, TEXT = "configs/quickstart.yaml", "configs/evidence/text.yaml"


@dataclass(frozen=True)
class Scale:
    """How long a section is in a profile: optimizer steps (None: the configuration's) and the number of seeds."""

    steps: int | None
    seeds: int


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        kind: "parity", "sweep" or "faults".
        configs: Of `fit`, merged.
        arms: The reference first.
        scales: By profile; a section is left out of profiles that are not here.
        control: Whether the dead-block control runs beside.
        rates: Of a sweep.
        options: Of `fit`, for all arms.
    """

    kind: str
    scales: dict[str, Scale]
    configs: tuple[str, ...] = ()
    arms: tuple[Arm, ...] = ()
    control: bool = False
    rates: int = 7
    options: tuple[str, ...] = ()


def _moments(kind: str) -> Arm:
    return Arm(
        kind.replace("/", "-"),
        f"FP8 GEMMs, BF16 weights rounded stochastically, moments {kind}",
        {"model": {"optimizer": {"class_path": "lightning_fp8.optim.FP8AdamW", "init_args": {"moments": kind}}}},
    )


def _rounding(kind: str) -> Arm:
    init_args = {"moments": "fp32", "rounding": kind}
    return Arm(
        kind,
        f"FP8 GEMMs, BF16 weights rounded {kind}, fp32 moments",
        {"model": {"optimizer": {"class_path": "lightning_fp8.optim.FP8AdamW", "init_args": init_args}}},
    )


_RELEASE = Arm(
    "fp8-release",
    "the configuration with gradients that are released in backward",
    {"model": {"gradient_release": True}, "trainer": {"gradient_clip_val": None}},
)
_PAIR = (ARMS["bf16"], ARMS["fp8"])
SECTIONS = {
    "skip-bigram": Section(
        "parity", {"short": Scale(300, 3), "full": Scale(300, 8)}, (SKIPS,), (*_PAIR, ARMS["fp8-gemms"]), control=True
    ),
    "text": Section(
        "parity", {"short": Scale(None, 3), "full": Scale(None, 5)}, (QUICKSTART, TEXT), _PAIR, control=True
    ),
    "moments": Section(
        "parity",
        {"short": Scale(150, 3), "full": Scale(300, 5)},
        (SKIPS, RARE),
        tuple(map(_moments, ("fp32", "bf16", "fp8", "coat", "e4m3"))),
    ),
    "rounding": Section(
        "parity",
        {"short": Scale(150, 3), "full": Scale(300, 5)},
        (SKIPS,),
        (ARMS["fp8-gemms"], *map(_rounding, ("nearest", "stochastic", "kahan"))),
        options=("--model.optimizer.init_args.lr=1.0e-4",),
    ),
    "sensitivity": Section("sweep", {"short": Scale(150, 1), "full": Scale(300, 3)}, (SKIPS,), _PAIR),
    "ledger": Section(
        "parity",
        dict.fromkeys(("short", "full", "gpu"), Scale(3, 1)),
        (QUICKSTART,),
        (*_PAIR, ARMS["bf16-weights"], _RELEASE, ARMS["fp8-lm"], ARMS["nanotron"]),
        options=("--trainer.limit_val_batches=1",),
    ),
    "presets": Section(
        "parity",
        {"short": Scale(300, 6), "full": Scale(500, 8)},
        (SKIPS,),
        (*_PAIR, ARMS["fp8-lm"], ARMS["nanotron"]),
        options=("--model.config.num_layers=4",),  # of which nanotron keeps the first and the last in BF16
    ),
    "faults": Section("faults", {"short": Scale(None, 2), "full": Scale(None, 3)}),
    **{
        f"gpu-{size}": Section(
            "parity",
            {"gpu": Scale(None, seeds)},
            (QUICKSTART, f"configs/evidence/{size}.yaml"),
            (*_PAIR, ARMS["fp8-rowwise"]),
            control=seeds > 1,
        )
        for size, seeds in (("26m", 3), ("150m", 1))
    },
}
SOURCES = {"skip-bigram": 32, "zipf": 512}  # and how many tokens they have


def prepare_data() -> None:
    """The texts that are not there yet."""
    for name, tokens in SOURCES.items():
        folder = Path("data/evidence", name)
        tokenizer = folder.with_suffix(".tokenizer.json")
        tokenizer.parent.mkdir(parents=True, exist_ok=True)
        spelling(tokens).save(str(tokenizer))
        generator = {
            "class_path": "lightning_fp8.data.spelled.Spelled",
            "init_args": {"source": name.replace("-", "_"), "documents": 96},
        }
        prepare([], str(folder), generator=generator, tokenizer=str(tokenizer), val_fraction=0.1)
    prepare(["stdlib"], "data/quickstart", vocab_size=2048, val_fraction=0.05, seed=0)


def measure(name: str, profile: str, jobs: int) -> dict[str, Any]:
    """The figures of a section, with what they depend on."""
    output, here = Path("runs/evidence", profile, name), machine()
    with recorded(output, here):
        figures = _figures(name, profile, jobs, output)
    return figures | {"profile": profile, "jobs": jobs, "machine": here, "commits": commits(output)}


def _figures(name: str, profile: str, jobs: int, output: Path) -> dict[str, Any]:
    section, command = SECTIONS[name], f"python benchmarks/evidence.py --profile {profile} --only {name}"
    scale = section.scales[profile]
    seeds = list(range(scale.seeds))
    if section.kind == "faults":
        return measure_faults(seeds, output) | {"command": command}
    arms = [*section.arms, *([ARMS[CONTROL]] if section.control else [])]
    configs = {arm.name: configuration(section.configs, arm, section.options) for arm in arms}
    if section.kind == "sweep":
        rates = sweep.rates_around(learning_rate(configs[arms[0].name]), section.rates)
        return sweep.write(swept(configs, rates, seeds, output, scale.steps, jobs), output, command)
    control = CONTROL if section.control else None
    comparison = compared(arms, configs, seeds, output, scale.steps, jobs, control, BAR)
    return report.write(comparison, output, command)


def main() -> None:
    """Measures what is asked for, section by section, and writes the page after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=["short", "full", "gpu"], default="short")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS))
    parser.add_argument("--jobs", type=int, default=0, help="runs at a time; default: the cores, or 1 on a GPU")
    parser.add_argument("--page-only", action="store_true", help="write the page from the figures that are there")
    args = parser.parse_args()
    jobs = args.jobs or (1 if args.profile == "gpu" else os.cpu_count() or 1)
    if not args.page_only:
        prepare_data()
        for name in args.only or [name for name, section in SECTIONS.items() if args.profile in section.scales]:
            print(f"== {name}", flush=True)
            found = measure(name, args.profile, jobs)
            file = RESULTS / args.profile / f"{name}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found, indent=2) + "\n")
            write_page(RESULTS, args.profile)
    write_page(RESULTS, args.profile)


if __name__ == "__main__":
    main()
