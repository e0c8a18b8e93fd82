"""Forward and backward of a stack of linear layers: BF16, each FP8 recipe, torchao's and Transformer Engine's.

    python benchmarks/linear.py [--width 1024] [--device cuda] [--compile] [--json results/linear.json]

All arms have the same weights and inputs. Recipes that the device cannot multiply natively are emulated; the table says
which.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from arms import Arm, arms
from measuring import interleaved, print_table, write
from torch import Tensor, nn

from lightning_fp8 import hardware
from lightning_fp8.compute import PRESETS
from lightning_fp8.compute.gemm import select_backend


def step_of(arm: Arm, x: Tensor, layers: int, *, compiled: bool) -> Callable[[], None]:
    """One forward and backward pass of a stack."""
    torch.manual_seed(0)
    width = x.shape[1]
    parts = [nn.Linear(width, width, bias=False, device=x.device, dtype=x.dtype) for _ in range(layers)]
    model = nn.Sequential(*parts)
    arm.convert(model)
    dy = torch.randn_like(x)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        model.zero_grad()
        x.grad = None
        with arm.context():
            y = forward(x)
        y.backward(dy)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default=hardware.device_type())
    parser.add_argument("--arms", nargs="+", default=["bf16", *PRESETS, "torchao", "te"])
    parser.add_argument("--compile", action="store_true", help="torch.compile every arm")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    device = torch.device(args.device)
    x = torch.randn(args.tokens, args.width, device=device, dtype=torch.bfloat16, requires_grad=True)
    steps = {name: step_of(arm, x, args.layers, compiled=args.compile) for name, arm in arms(args.arms).items()}
    timings = interleaved(steps, device, repeats=args.repeats)
    rows: dict[str, dict[str, Any]] = {}
    for name, timing in timings.items():
        rows[name] = {"ms": 1e3 * timing.median, "low": 1e3 * timing.low, "high": 1e3 * timing.high}
        if "bf16" in timings:
            rows[name]["x bf16"] = timings["bf16"].median / timing.median
        rows[name]["GEMMs"] = _gemms(name, args.device)
    print(f"{args.layers} layers of {args.width} x {args.width}, {args.tokens} tokens, {hardware.describe_device()}")
    print_table({name: {key: _text(value) for key, value in row.items()} for name, row in rows.items()})
    write(args.json, "linear", vars(args), rows)


def _gemms(arm: str, device: str) -> str:
    if arm not in PRESETS:
        return {"bf16": "bf16"}.get(arm, "its own")
    return "native" if select_backend("auto", PRESETS[arm]) == "auto" and device != "cpu" else "emulated"


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


if __name__ == "__main__":
    main()
