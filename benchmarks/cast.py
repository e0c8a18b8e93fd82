"""The bandwidth of each cast to FP8, beside the device's own copy of a bf16 matrix.

    python benchmarks/cast.py [--rows 16384] [--columns 8192] [--device cuda] [--json results/cast.json]

A cast is bound by memory if it is done well, so its figure is gigabytes a second: of the bytes that have to be moved,
counted from what is read and written (`read` passes over the input, one byte a code), not from what a kernel happens to
move. Casts fused with SwiGLU or RMSNorm stand beside the module followed by a cast, which has to move no more than they
and is counted so. On devices without kernels the reference in plain torch is timed, through the same code. Arms take
turns, and a buffer larger than any cache is written between them.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import Timing, print_table, write
from torch import Tensor
from torch.nn import functional as F

from lightning_fp8 import hardware
from lightning_fp8.kernels import cast
from lightning_fp8.kernels.fused import gated_cast, normed_cast
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
    up, gain = torch.randn_like(x), torch.ones_like(x[0])
    both: dict[str, Any] = {"rows": True, "columns": True}
    # SwiGLU reads two matrices a pass. Fused casts in both layouts, and the same by a module and a cast.
    for name, passes in {"tensor": 2, "tensor, delayed": 1, "1x128": 1}.items():
        how = granularities[name][2] | both
        arms[f"swiglu, {name}"] = Arm(2 * passes, 2, lambda x, how=how: gated_cast(x, up, E4M3, **how))
        arms[f"swiglu, then {name}"] = Arm(2 * passes, 2, lambda x, how=how: cast(F.silu(x) * up, E4M3, **how))
    for name, passes in {"tensor": 2, "tensor, delayed": 1, "1x128": 2}.items():
        how = granularities[name][2] | both
        arms[f"norm, {name}"] = Arm(passes, 2, lambda x, how=how: normed_cast(x, gain, 1e-5, E4M3, **how))
        arms[f"norm, then {name}"] = Arm(
            passes, 2, lambda x, how=how: cast(F.rms_norm(x, gain.shape, gain, 1e-5), E4M3, **how)
        )
    return arms


def measure(arms: dict[str, Arm], x: Tensor, repeats: int) -> dict[str, Timing]:
    """Seconds of each arm; they take turns."""
    cold = torch.empty(COLD_BYTES if x.is_cuda else 1, dtype=torch.uint8, device=x.device)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 2):
        for name, arm in arms.items():
            cold.zero_()
            elapsed = _time(lambda run=arm.run: run(x), x.is_cuda)
            if repeat >= 2:  # the first ones compile and fill caches
                seconds[name].append(elapsed)
    return {name: Timing.of(times) for name, times in seconds.items()}


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
    on_cuda = hardware.device_type() == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384 if on_cuda else 512)
    parser.add_argument("--columns", type=int, default=8192 if on_cuda else 512)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda" if on_cuda else "cpu")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    x = torch.randn(args.rows, args.columns, device=args.device).bfloat16()
    arms = build_arms(x)
    timings = measure(arms, x, args.repeats)
    kernels = "Triton kernels" if x.is_cuda and hardware.runs_kernels() else "the reference in plain torch"
    copied = arms["copy"].bytes(x) / timings["copy"].median
    rows: dict[str, dict[str, float]] = {}
    for name, timing in timings.items():
        moved = arms[name].bytes(x)
        rows[name] = {
            "B/element": moved / x.numel(),
            "us": 1e6 * timing.median,
            "low": 1e6 * timing.low,
            "high": 1e6 * timing.high,
            "GB/s": moved / timing.median / 1e9,
            "/ copy": moved / timing.median / copied,
        }
    print(f"{args.rows} x {args.columns} bf16, {kernels}, {hardware.describe_device()}")
    print_table({name: {key: f"{value:.4g}" for key, value in row.items()} for name, row in rows.items()})
    write(args.json, "cast", vars(args) | {"kernels": kernels}, rows)


if __name__ == "__main__":
    main()
