"""Forward and backward of a stack of linear layers: BF16, each FP8 recipe, and torchao's Float8Linear if installed.

    python benchmarks/linear.py [--width 1024] [--device cuda] [--compile] [--json results.json]

All arms have the same weights and inputs. Every repeat times each arm once, so that a machine whose speed drifts is
fair to all, and medians are compared. Recipes that the device cannot multiply natively are emulated; the table says
which.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_fp8 import convert_linears, hardware
from lightning_fp8.compute import PRESETS
from lightning_fp8.compute.gemm import select_backend


def build_arms(width: int, layers: int, device: str) -> dict[str, nn.Module]:
    """One stack an arm, all with the same weights."""

    def stack() -> nn.Module:
        torch.manual_seed(0)
        parts = [nn.Linear(width, width, bias=False, device=device, dtype=torch.bfloat16) for _ in range(layers)]
        return nn.Sequential(*parts)

    arms = {"bf16": stack()}
    for preset in PRESETS:
        arms[preset] = stack()
        convert_linears(arms[preset], preset)
    if torchao := _torchao():
        arms["torchao"] = torchao(stack())
    return arms


def _torchao() -> Callable[[nn.Module], nn.Module] | None:
    """The conversion of torchao; emulated where there are no FP8 GEMMs, as its own tests do it."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        return None
    emulate = hardware.why_not_native(("tensor",)) is not None
    return lambda model: convert_to_float8_training(model, config=Float8LinearConfig(emulate=emulate))


def measure(arms: dict[str, Callable[..., Any]], tokens: int, width: int, device: str, repeats: int) -> dict[str, Any]:
    """Seconds of each arm: the median and the quartiles of interleaved repeats."""
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 2):
        for name, arm in arms.items():
            x.grad = None
            started = time.perf_counter()
            arm(x).backward(dy)
            hardware.wait_for(x.device)
            if repeat >= 2:  # the first ones choose kernels, compile and fill caches
                seconds[name].append(time.perf_counter() - started)
            for parameter in arm.parameters():
                parameter.grad = None
    return {name: statistics.quantiles(times, n=4, method="inclusive") for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile every arm")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    models = build_arms(args.width, args.layers, args.device)
    arms = {name: torch.compile(model) if args.compile else model for name, model in models.items()}
    quartiles = measure(arms, args.tokens, args.width, args.device, args.repeats)
    print(f"{args.layers} layers of {args.width} x {args.width}, {args.tokens} tokens, {hardware.describe_device()}")
    print(f"{'arm':14} {'ms':>9} {'quartiles':>19} {'/ bf16':>7}  GEMMs")
    results = {}
    for name, (low, median, high) in quartiles.items():
        ratio = median / quartiles["bf16"][1]
        gemms = {"bf16": "bf16", "torchao": "its own"}.get(name) or _backend(name, args.device)
        print(f"{name:14} {median * 1e3:9.2f} {low * 1e3:9.2f}-{high * 1e3:9.2f} {ratio:7.2f}  {gemms}")
        results[name] = {"seconds": median, "quartiles": [low, high], "per_bf16": ratio, "gemms": gemms}
    if args.json:
        setting = {key: value for key, value in vars(args).items() if key != "json"}
        machine = {
            "machine": hardware.describe_device(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        args.json.write_text(json.dumps({**machine, "setting": setting, "arms": results}, indent=2) + "\n")


def _backend(preset: str, device: str) -> str:
    return "native" if select_backend("auto", PRESETS[preset]) == "auto" and device != "cpu" else "emulated"


if __name__ == "__main__":
    main()
