"""What a linear layer in FP8 costs the host, where there is hardly anything to compute: a tiny layer, eager.

    python benchmarks/overhead.py [--tokens 16] [--width 32] [--json results/overhead.json]

Forward and backward of one layer that is so small that Python, the dispatcher and launches are all there is. A GPU
hides this time as long as its kernels take longer; on a CPU emulation adds to it, which torchao does as well. Times are
of the processor, in blocks of calls that take turns; operations are those that reach the dispatcher in a step.
"""

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from arms import Arm, arms
from measuring import Timing, print_table, write
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fp8 import hardware
from lightning_fp8.compute import PRESETS


class Operations(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def step_of(arm: Arm, tokens: int, width: int, device: torch.device) -> Callable[[], None]:
    """Forward and backward of one layer, gradients of input and weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width, bias=False, device=device, dtype=torch.bfloat16))
    arm.convert(model)
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)
    weight = next(model.parameters())

    def step() -> None:
        x.grad = weight.grad = None
        with arm.context():
            y = model(x)
        y.backward(dy)

    return step


def measure(steps: dict[str, Callable[[], None]], device: torch.device, repeats: int, calls: int) -> dict[str, Timing]:
    """Processor seconds of a call of each arm; blocks of `calls` take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    gc.disable()
    for repeat in range(repeats + 2):
        for name, step in steps.items():
            started = time.process_time()
            for _ in range(calls):
                step()
            hardware.wait_for(device)
            if repeat >= 2:
                seconds[name].append((time.process_time() - started) / calls)
        gc.collect()
    gc.enable()
    return {name: Timing.of(values) for name, values in seconds.items()}


def operations_of(step: Callable[[], None]) -> int:
    """How many operations a call is."""
    with Operations() as operations:
        step()
    return operations.count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=hardware.device_type())
    parser.add_argument("--arms", nargs="+", default=["bf16", *PRESETS, "torchao", "te"])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--calls", type=int, default=50, help="of an arm in its turn")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    steps = {name: step_of(arm, args.tokens, args.width, device) for name, arm in arms(args.arms).items()}
    timings = measure(steps, device, args.repeats, args.calls)
    torchao = timings.get("torchao")
    rows: dict[str, dict[str, float]] = {}
    for name, timing in timings.items():
        rows[name] = {
            "us": 1e6 * timing.median,
            "low": 1e6 * timing.low,
            "high": 1e6 * timing.high,
            "operations": operations_of(steps[name]),
        }
        if torchao:
            rows[name]["/ torchao"] = timing.median / torchao.median
    print(f"One layer of {args.width} x {args.width}, {args.tokens} tokens, eager, {hardware.describe_device()}")
    print_table({name: {key: f"{value:.4g}" for key, value in row.items()} for name, row in rows.items()})
    write(args.json, "overhead", vars(args), rows)


if __name__ == "__main__":
    main()
