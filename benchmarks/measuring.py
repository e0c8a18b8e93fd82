"""What the benchmarks have in common: fair timing, the machine in words, tables and JSON.

Arms take turns, so that a machine whose speed drifts is fair to all, and medians are compared; the quartiles beside
them say how far to trust a difference.
"""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_fp8 import hardware

# What measurements write is no change of what they measure.
_CHANGES = ("status", "--porcelain", "-uno", "--", ":/", ":!/benchmarks/results", ":!/docs/evidence.md")
PACKAGES = ("torch", "triton", "lightning", "torchao", "transformer-engine", "bitsandbytes", "flashoptim")


class Timing(NamedTuple):
    """Seconds: the median of all repeats and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high)


def interleaved(
    arms: Mapping[str, Callable[[], Any]], device: torch.device, *, repeats: int, warmup: int = 2
) -> dict[str, Timing]:
    """Seconds of each arm, timed on the host until the device is done.

    Args:
        arms: What is called.
        device: Is waited for.
        repeats: Timed calls of each arm; the arms take turns.
        warmup: Calls before: they compile, choose kernels and fill caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + warmup):
        for name, arm in arms.items():
            hardware.wait_for(device)
            started = time.perf_counter()
            arm()
            hardware.wait_for(device)
            if repeat >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return {name: Timing.of(values) for name, values in seconds.items()}


def machine() -> dict[str, Any]:
    """What figures depend on: the device, the versions, the commit and whether the tree differed from it."""
    here = Path(__file__).parent
    git = {
        name: subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=False).stdout.strip()
        for name, command in {"commit": ["rev-parse", "HEAD"], "changed": _CHANGES}.items()
    }
    return {
        "device": hardware.describe_device(),
        "fp8": hardware.describe_fp8(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {package: found for package in PACKAGES if (found := _version(package))},
        "commit": git["commit"],
        "changed": bool(git["changed"]),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write(path: Path | None, benchmark: str, setting: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the figures with the machine and the setting, if there is a path."""
    if path is None:
        return
    plain = {name: value for name, value in setting.items() if isinstance(value, str | int | float | bool | list)}
    figures = {"benchmark": benchmark, **machine(), "setting": plain, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n")


def print_table(rows: Mapping[str, Mapping[str, str]]) -> None:
    """One line a row; the columns are those of the first."""
    columns = list(next(iter(rows.values())))
    names = max(map(len, rows))
    widths = {column: max(len(column), *(len(row[column]) for row in rows.values())) for column in columns}
    print(" " * names, *(f"{column:>{widths[column]}}" for column in columns), sep="  ")
    for name, row in rows.items():
        print(f"{name:{names}}", *(f"{row[column]:>{widths[column]}}" for column in columns), sep="  ")
