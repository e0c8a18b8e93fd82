"""What a step of AdamW costs and what it gets wrong: torch's own, `FP8AdamW` in each format, and others if installed.

    python benchmarks/optimizer.py [--elements 33554432] [--device cuda] [--arms fp8 torch] [--json results.json]

Each arm has weights of its own, all of one set of shapes, and random gradients. Every repeat steps each arm once, so
that a machine whose speed drifts is fair to all, and medians are compared; `--cpu-time` counts the seconds of CPU
instead of those of the clock, for machines that are shared. Bytes a parameter are those of the storages: weights,
gradients and all state that the optimizer keeps.

The error is that of the update u, what the learning rate multiplies: its relative L2 distance from that of fp32's fused
AdamW over 100 steps at betas .9 and .95 on a 64 x 256 weight, whose columns have gradients of log-normally different
size (sigma 1). It is read off a step with learning rate 1 of weights that are zero before, which therefore are -u
after; in fp32 but for the arm of plain bf16, whose moments are as its weights.

"operations" is the step of `FP8AdamW` without its kernel, and "compiled" what torch.compile makes of that.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from measuring import Timing, print_table, write
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_fp8 import hardware
from lightning_fp8.optim import FP8AdamW, packing
from lightning_fp8.optim.step import MOMENTS

STEPS, ROWS, COLUMNS = 100, 64, 256
BETAS, EPS = (0.9, 0.95), 1e-8
OTHERS = {"torchao": ("AdamWFp8", "AdamW8bit"), "bitsandbytes": ("AdamW8bit",), "flashoptim": ("FlashAdamW",)}


class Arm(NamedTuple):
    """An optimizer: how it is made, the dtype of its weights, and whether it may use kernels of ours."""

    make: Callable[..., Optimizer]
    dtype: torch.dtype = torch.bfloat16
    kernel: bool = True

    def stepping(self) -> contextlib.AbstractContextManager[Any]:
        """What to step in."""
        return contextlib.nullcontext() if self.kernel else mock.patch.object(packing, "has_adamw", return_value=False)


def all_arms() -> dict[str, Arm]:
    """Those that can be made here, by name."""
    arms = {
        "torch fused fp32": Arm(_fused, torch.float32),
        "torch fused bf16": Arm(_fused),
        "FP8AdamW fp8": Arm(FP8AdamW),
    }
    for moments in MOMENTS:
        for compiled in (False, True):
            how = "compiled" if compiled else "operations"
            arms[f"FP8AdamW {moments}, {how}"] = Arm(_ours(moments, compiled), kernel=False)
    for package, names in OTHERS.items():
        for name in names:
            with contextlib.suppress(ImportError):
                module = __import__(f"{package}.optim" if package != "flashoptim" else package, fromlist=[name])
                arms[f"{package} {name}"] = Arm(getattr(module, name))
    return arms


def _fused(params: Any, **options: Any) -> Optimizer:
    return torch.optim.AdamW(params, fused=True, **options)


def _ours(moments: Any, compiled: bool) -> Callable[..., Optimizer]:
    return lambda params, **options: FP8AdamW(params, moments=moments, compile=compiled, **options)


def parameters(elements: int, dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    """Square matrices of about so many elements in all, with gradients; the same for every arm."""
    gen = torch.Generator().manual_seed(0)
    width = min(2048, 2 ** ((elements.bit_length() - 1) // 2))
    params = []
    for _ in range(max(1, elements // width**2)):
        params.append(nn.Parameter((torch.randn(width, width, generator=gen) * 0.02).to(device, dtype)))
        params[-1].grad = (torch.randn(width, width, generator=gen) * 1e-3).to(device, dtype)
    return params


def measure(
    arms: dict[str, Arm], elements: int, device: str, repeats: int, *, cpu_time: bool
) -> dict[str, dict[str, Any]]:
    """For each arm the time of a step and bytes a parameter; an arm that fails says why instead."""
    clock = time.process_time if cpu_time else time.perf_counter
    running: dict[str, Optimizer] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, arm in arms.items():
        params = parameters(elements, arm.dtype, device)
        try:
            optimizer = arm.make(params, lr=1e-4)
            with arm.stepping():
                optimizer.step()  # compiles, and creates the state
        except Exception as error:  # others' optimizers refuse devices in many ways
            found[name] = {"refused": f"{type(error).__name__}: {error}".splitlines()[0]}
            continue
        state = [tensor for state in optimizer.state.values() for tensor in state.values()]
        tensors = [*params, *(p.grad for p in params), *state]
        count = sum(p.numel() for p in params)
        found[name] = {"B/param": sum(map(size_of, tensors)) / count}
        running[name] = optimizer
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for repeat in range(repeats + 2):
        for name, optimizer in running.items():
            started = clock()
            with arms[name].stepping():
                optimizer.step()
            hardware.wait_for(torch.device(device))
            if repeat >= 2:  # the first ones fill caches
                seconds[name].append(clock() - started)
    timings = {name: Timing.of(times) for name, times in seconds.items()}
    fp32 = timings.get("torch fused fp32")
    for name, timing in timings.items():
        times = {"ms": 1e3 * timing.median, "low": 1e3 * timing.low, "high": 1e3 * timing.high}
        found[name] = times | {"ns/param": 1e9 * timing.median / count} | found[name]
        if fp32:
            found[name]["x fused fp32"] = fp32.median / timing.median
    return found


def size_of(value: Any) -> int:
    """Bytes of a tensor, or of those that a tensor subclass consists of."""
    if not isinstance(value, Tensor):
        return 0
    if hasattr(value, "__tensor_flatten__"):
        return sum(size_of(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.numel() * value.element_size()


def gradients() -> Iterator[Tensor]:
    """Of the replay, fp32 [ROWS, COLUMNS]."""
    gen = torch.Generator().manual_seed(0)
    size = torch.randn(COLUMNS, generator=gen).exp() * 1e-3
    return (torch.randn(ROWS, COLUMNS, generator=gen) * size for _ in range(STEPS))


def updates(arm: Arm, dtype: torch.dtype, device: str) -> Tensor:
    """What an arm makes of the gradients: [STEPS, ROWS, COLUMNS]."""
    p = nn.Parameter(torch.zeros(ROWS, COLUMNS, dtype=dtype, device=device))
    optimizer = arm.make([p], lr=1.0, betas=BETAS, eps=EPS, weight_decay=0.0)
    found = []
    for grad in gradients():
        p.data.zero_()
        p.grad = grad.to(device, dtype)
        with arm.stepping():
            optimizer.step()
        found.append(-p.detach().float())
    return torch.stack(found).double()


def errors(arms: dict[str, Arm], device: str) -> dict[str, float]:
    """The relative L2 error of each arm's updates."""
    exact = updates(all_arms()["torch fused fp32"], torch.float32, device)
    found = {}
    for name, arm in arms.items():
        dtype = torch.bfloat16 if name == "torch fused bf16" else torch.float32
        found[name] = ((updates(arm, dtype, device) - exact).norm() / exact.norm()).item()
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 25)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arms", nargs="+", help="those whose name contains one of these")
    parser.add_argument("--cpu-time", action="store_true", help="time in seconds of CPU")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(argv)
    arms = {name: arm for name, arm in all_arms().items() if not args.arms or any(part in name for part in args.arms)}
    results = measure(arms, args.elements, args.device, args.repeats, cpu_time=args.cpu_time)
    running = {name: arm for name, arm in arms.items() if "ms" in results[name]}
    for name, error in errors(running, args.device).items():
        results[name]["relL2 %"] = 100 * error
    count = sum(p.numel() for p in parameters(args.elements, torch.bfloat16, "meta"))
    print(f"{count:,} parameters, {hardware.describe_device()}")
    for name in results.keys() - running.keys():
        print(f"{name}: {results[name]['refused']}")
    if running:
        print_table({name: {key: f"{value:.4g}" for key, value in results[name].items()} for name in running})
    write(args.json, "optimizer", vars(args), results)


if __name__ == "__main__":
    main()
