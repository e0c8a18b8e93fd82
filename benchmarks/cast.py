"""The bandwidth of each cast to FP8, beside the device's own copy of a bf16 matrix.

    python benchmarks/cast.py [--rows 16384] [--columns 8192] [--device cuda] [--json results.json]

A cast is bound by memory if it is done well, so its figure is gigabytes a second: of the bytes that have to be moved,
counted from what is read and written (`read` passes over the input, one byte a code), not from what a kernel happens to
move. On devices without kernels the reference in plain torch is timed, through the same code. Arms are interleaved and
medians compared; a buffer larger than any cache is written between them.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_fp8 import hardware
from lightning_fp8.kernels import cast
from lightning_fp8.numerics import E4M3

COLD_BYTES = 256 * 2**20  # more than a GPU's second-level cache


class Arm(NamedTuple):
    """One way to cast: how often the input has to be read, how many layouts are written, and the call."""

    reads: int
    layouts: int
    run: Callable[[Tensor], Any]

    def bytes(self, x: Tensor) -> int:
        """What has to be read and written, scales not counted."""
        return x.numel() * (self.reads * x.element_size() + self.layouts)


def build_arms(x: Tensor) -> dict[str, Arm]:
    """Every granularity, by rows alone and in both layouts."""
    remembered = x.abs().amax().float() / E4M3.max
    target = torch.empty_like(x)
    granularities: dict[str, tuple[int, int, dict[str, Any]]] = {
        # Passes over the input for rows alone and for both layouts, and how to ask for it.
        "tensor": (2, 2, {}),
        "tensor, delayed": (1, 1, {"remembered": remembered}),
        "row": (1, 2, {"tile": (1, None), "power_of_two": True}),
        "1x128": (1, 1, {"tile": (1, 128)}),
        "128x128": (1, 1, {"tile": (128, 128)}),
        "1x32": (1, 1, {"tile": (1, 32), "power_of_two": True}),
    }
    arms = {"copy": Arm(1, x.element_size(), target.copy_)}
    for name, (reads_rows, reads_both, how) in granularities.items():
        arms[f"{name}: rows"] = Arm(reads_rows, 1, lambda x, how=how: cast(x, E4M3, rows=True, **how))
        arms[f"{name}: both"] = Arm(reads_both, 2, lambda x, how=how: cast(x, E4M3, rows=True, columns=True, **how))
    return arms


def measure(arms: dict[str, Arm], x: Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds of each arm: the quartiles of interleaved repeats."""
    cold = torch.empty(COLD_BYTES if x.is_cuda else 1, dtype=torch.uint8, device=x.device)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 2):
        for name, arm in arms.items():
            cold.zero_()
            elapsed = _time(lambda run=arm.run: run(x), x.is_cuda)
            if repeat >= 2:  # the first ones compile and fill caches
                seconds[name].append(elapsed)
    return {name: statistics.quantiles(times, n=4, method="inclusive") for name, times in seconds.items()}


def _time(run: Callable[[], Any], on_cuda: bool) -> float:
    if not on_cuda:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    # The device's own clock: what the host needs to launch is hidden behind the buffer that is being written.
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def main() -> None:
    on_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384 if on_cuda else 512)
    parser.add_argument("--columns", type=int, default=8192 if on_cuda else 512)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda" if on_cuda else "cpu")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    x = torch.randn(args.rows, args.columns, device=args.device).bfloat16()
    arms = build_arms(x)
    quartiles = measure(arms, x, args.repeats)
    kernels = "Triton kernels" if x.is_cuda and hardware.runs_kernels() else "the reference in plain torch"
    print(f"{args.rows} x {args.columns} bf16, {kernels}, {hardware.describe_device()}")
    print(f"{'arm':24} {'B/element':>9} {'us':>9} {'quartiles':>19} {'GB/s':>8} {'/ copy':>7}")
    results = {}
    for name, (low, median, high) in quartiles.items():
        moved = arms[name].bytes(x)
        rate, copy_rate = moved / median, arms["copy"].bytes(x) / quartiles["copy"][1]
        results[name] = {
            "bytes": moved,
            "seconds": median,
            "quartiles": [low, high],
            "bytes_per_second": rate,
            "of_copy": rate / copy_rate,
        }
        spread = f"{low * 1e6:.1f} to {high * 1e6:.1f}"
        print(
            f"{name:24} {moved / x.numel():9.0f} {median * 1e6:9.1f} {spread:>19} {rate / 1e9:8.1f}"
            f" {rate / copy_rate:7.2f}"
        )
    if args.json:
        facts = {
            "device": hardware.describe_device(),
            "kernels": kernels,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "rows": args.rows,
            "columns": args.columns,
            "repeats": args.repeats,
        }
        args.json.write_text(json.dumps(facts | {"arms": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
