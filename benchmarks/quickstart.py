"""Does the quickstart learn in FP8 as in BF16? Seeds x arms, through the command line, as a user runs it.

    python benchmarks/quickstart.py                 # seeds 0, 1, 2; about 20 minutes on 2 cores
    python benchmarks/quickstart.py --steps 50      # a quick look

Both arms of a seed have the same initial weights, data and order. Prints a table and writes it, with the machine, to
benchmarks/results/quickstart.json; finished runs are not repeated.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ARMS = {"fp8": [], "bf16": ["-c", "configs/precision/bf16.yaml"]}
BAR_GZIP, BAR_GAP = 0.92, 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="optimizer steps; by default those of the config")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quickstart.json"))
    args = parser.parse_args()
    runs = {f"{arm}-{seed}": train(arm, seed, args.steps) for seed in args.seeds for arm in ARMS}

    gzip = json.loads(Path("data/quickstart/manifest.json").read_text())["splits"]["val"]["gzip_bits_per_byte"]
    mean = {arm: statistics.mean(runs[f"{arm}-{seed}"]["val/bits_per_byte"] for seed in args.seeds) for arm in ARMS}
    worst = max(runs[f"fp8-{seed}"]["val/bits_per_byte"] for seed in args.seeds) / gzip
    gap = mean["fp8"] / mean["bf16"] - 1
    bars = f"at most {BAR_GZIP} and {BAR_GAP:+.0%}"
    for name, run in runs.items():
        print(
            f"{name:8} {run['val/bits_per_byte']:.4f} bits/byte = {run['val/bits_per_byte'] / gzip:.4f} x gzip -9"
            f"   {run['seconds']:5.0f} s   {run['tokens_per_second']:7,.0f} tokens/s"
        )
    print(f"worst FP8 seed: {worst:.4f} x gzip -9; mean of FP8 over mean of BF16: {gap:+.2%}; wanted: {bars}")
    result = {
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        },
        "python": platform.python_version(),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "gzip_bits_per_byte": gzip,
        "worst_fp8_over_gzip": worst,
        "fp8_over_bf16": gap,
        "runs": runs,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    raise SystemExit(worst > BAR_GZIP or gap > BAR_GAP)


def train(arm: str, seed: int, steps: int | None) -> dict[str, float]:
    """The summary of one run, from its folder if it is already there."""
    folder = Path("runs/benchmark", f"{arm}-{seed}" + (f"-{steps}" if steps else ""))
    command = [sys.executable, "-m", "lightning_fp8", "fit", "-c", "configs/quickstart.yaml", *ARMS[arm]]
    command += [f"--seed_everything={seed}", f"--data.seed={seed}", f"--trainer.default_root_dir={folder}"]
    if steps:
        command += [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
    timing = folder / "seconds.json"
    if not timing.exists():
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        timing.write_text(json.dumps(time.perf_counter() - started))
    return {**json.loads((folder / "summary.json").read_text()), "seconds": json.loads(timing.read_text())}


if __name__ == "__main__":
    main()
