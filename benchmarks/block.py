"""Forward and backward of one block of a decoder, shaped as Llama 3 8B's where there is a GPU.

    python benchmarks/block.py [--arms bf16 tensorwise torchao te] [--eager] [--json results/block.json]

Each arm is timed compiled and eager, against BF16 in the same mode. On devices without FP8 GEMMs they are emulated, the
block is a toy, and what this prints is the price of emulation.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from arms import FUSED, Arm, arms
from measuring import Timing, interleaved, print_table, write
from torch import Tensor

from lightning_fp8.compute import PRESETS
from lightning_fp8.models import DecoderConfig
from lightning_fp8.models.attention import sight_of_text
from lightning_fp8.models.decoder import Block


def shape_of(args: argparse.Namespace) -> DecoderConfig:
    """Llama 3 8B's proportions at any width: heads of 128 at most, four to a key/value head, an MLP of 3.5 widths."""
    head = min(128, args.hidden_size // 4)
    return DecoderConfig(
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 7 // 2,
        num_heads=args.hidden_size // head,
        num_kv_heads=max(1, args.hidden_size // head // 4),
        num_layers=1,
        qk_norm=False,
    )


def step_of(config: DecoderConfig, arm: Arm, x: Tensor, dy: Tensor, *, compiled: bool) -> Callable[[], None]:
    """One forward and backward pass of a block; all arms have the same weights."""
    torch.manual_seed(0)
    block = Block(config, 0).to(x.device, torch.bfloat16)
    arm.convert(block)
    sight = sight_of_text(x.shape[1], config, None, x.device)
    forward = torch.compile(block) if compiled else block

    def step() -> None:
        block.zero_grad()
        x.grad = None
        with arm.context():
            y = forward(x, sight)
        y.backward(dy)

    return step


def main() -> None:
    on_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if on_cuda else "cpu")
    parser.add_argument("--arms", nargs="+", default=["bf16", *PRESETS, *FUSED, "torchao", "te"])
    parser.add_argument("--hidden-size", type=int, default=4096 if on_cuda else 128)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096 if on_cuda else 64)
    parser.add_argument("--repeats", type=int, default=30 if on_cuda else 5)
    parser.add_argument("--eager", action="store_true", help="leave the compiled arms out")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    device, config = torch.device(args.device), shape_of(args)
    x = torch.randn(args.batch_size, args.length, args.hidden_size, device=device, dtype=torch.bfloat16)
    x.requires_grad_()
    dy = torch.randn_like(x)
    chosen = arms(args.arms)
    rows: dict[str, dict[str, object]] = {}
    for mode in ("eager",) if args.eager else ("eager", "compiled"):
        steps = {name: step_of(config, arm, x, dy, compiled=mode == "compiled") for name, arm in chosen.items()}
        timings = interleaved(steps, device, repeats=args.repeats)
        rows |= {f"{name}, {mode}": _row(timing, timings.get("bf16")) for name, timing in timings.items()}
        torch.compiler.reset()
    print(f"A block of {args.hidden_size} wide, {args.batch_size} x {args.length} tokens")
    print_table({name: {key: f"{value:.4g}" for key, value in row.items()} for name, row in rows.items()})
    write(args.json, "block", vars(args), rows)


def _row(timing: Timing, bf16: Timing | None) -> dict[str, object]:
    times = {"ms": 1e3 * timing.median, "low": 1e3 * timing.low, "high": 1e3 * timing.high}
    return times if bf16 is None else times | {"x bf16": bf16.median / timing.median}


if __name__ == "__main__":
    main()
