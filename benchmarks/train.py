"""Training a decoder: tokens a second, peak memory and MFU of whole steps, optimizer included.

    python benchmarks/train.py [--size 150m] [--arms mixed bf16 tensorwise torchao te] [--compile] [--json FILE]
    python benchmarks/train.py --size 8b --layers 0        # as many of Llama 3 8B's layers as fit for every arm

The arms, all with the same initial weights and data:

    mixed        fp32 weights, bf16 autocast, torch's fused AdamW: 16 bytes a parameter
    bf16         bf16 weights rounded stochastically, fp32 moments: 12
    a recipe     the same weights, FP8 GEMMs of that recipe, FP8 moments: 6; "+fused": norms and MLPs write FP8
    torchao, te  fp32 weights, their FP8 linear layers, torch's fused AdamW

Arms run one after the other, each built anew and alone on the device, because two may not fit beside each other; the
order is gone through as often as `--rounds` says, so that drift shows as spread.
"""

import argparse
import gc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from arms import FUSED, Arm, arms
from measuring import Timing, interleaved, print_table, write
from torch import nn

from lightning_fp8 import end_step, hardware
from lightning_fp8.compute import PRESETS
from lightning_fp8.models import Decoder, DecoderConfig
from lightning_fp8.models.accounting import flops_per_token
from lightning_fp8.optim import FP8AdamW

SIZES = {
    "toy": DecoderConfig(
        vocab_size=512, hidden_size=64, intermediate_size=192, num_layers=2, num_heads=2, num_kv_heads=2
    ),
    "150m": DecoderConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_layers=10, num_heads=16, num_kv_heads=16
    ),
    "1b": DecoderConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, num_kv_heads=8
    ),
    "8b": DecoderConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8
    ),
}
FULL = ("mixed", "torchao", "te")  # arms with fp32 weights and torch's optimizer
SPARE = 0.92  # share of the device's memory that a slice may take


def build(name: str, arm: Arm, config: DecoderConfig, args: argparse.Namespace) -> Callable[[], None]:
    """A function that makes one training step."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    model = Decoder(config, activation_checkpointing=args.checkpointing)
    model.to(device, torch.float32 if name in FULL else torch.bfloat16)
    arm.convert(model)
    optimizer = _optimizer(name, model)
    forward: Any = torch.compile(model) if args.compile else model
    tokens = torch.randint(config.vocab_size, (args.batch_size, args.length + 1), device=device)

    def step() -> None:
        autocast = torch.autocast(device.type, torch.bfloat16) if name in FULL else nullcontext()
        with autocast, arm.context():
            loss = forward(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        end_step(model)

    return step


def _optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name in FULL:
        return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    moments = "fp32" if name == "bf16" else "fp8"
    return FP8AdamW(model.named_parameters(), lr=1e-4, moments=moments)


def measure(name: str, arm: Arm, config: DecoderConfig, args: argparse.Namespace) -> tuple[Timing, int | None]:
    """Seconds of a step, and the most bytes of the device's memory that tensors took; None on CPUs."""
    device = torch.device(args.device)
    _empty(device)
    timing = interleaved({name: build(name, arm, config, args)}, device, repeats=args.repeats, warmup=3)[name]
    peak = hardware.peak_memory(device)
    _empty(device)
    return timing, peak


def _empty(device: torch.device) -> None:
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def layers_that_fit(chosen: dict[str, Arm], config: DecoderConfig, args: argparse.Namespace) -> int:
    """How many layers every arm can train, from the peaks of two and four layers."""
    limit = SPARE * torch.cuda.get_device_properties(args.device).total_memory
    most = config.num_layers
    for name, arm in chosen.items():
        peaks = [measure(name, arm, config.__class__(**{**vars(config), "num_layers": n}), args)[1] for n in (2, 4)]
        a_layer = (peaks[1] - peaks[0]) / 2
        most = min(most, int((limit - peaks[0]) / a_layer) + 2)
        print(f"{name}: {a_layer / 2**30:.2f} GiB a layer")
    return most


def main() -> None:
    on_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if on_cuda else "cpu")
    parser.add_argument("--size", choices=SIZES, default="150m" if on_cuda else "toy")
    parser.add_argument("--layers", type=int, help="instead of the size's own; 0: as many as fit")
    parser.add_argument("--arms", nargs="+", default=["mixed", "bf16", *PRESETS, *FUSED, "torchao", "te"])
    parser.add_argument("--batch-size", type=int, default=8 if on_cuda else 2)
    parser.add_argument("--length", type=int, default=2048 if on_cuda else 32)
    parser.add_argument("--checkpointing", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--repeats", type=int, default=10 if on_cuda else 3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    config = SIZES[args.size]
    bf16 = Arm(lambda model: model)
    chosen = {name: bf16 for name in args.arms if name in ("mixed", "bf16")}
    chosen |= arms([name for name in args.arms if name not in chosen])
    if args.layers is not None:
        layers = args.layers or layers_that_fit(chosen, config, args)
        config = config.__class__(**{**vars(config), "num_layers": layers})
    found: dict[str, list[tuple[Timing, int | None]]] = {name: [] for name in chosen}
    for _ in range(args.rounds):
        for name, arm in chosen.items():
            found[name].append(measure(name, arm, config, args))
    rows = {name: _row(results, config, args) for name, results in found.items()}
    print(f"{args.size}: {config.num_layers} layers, {args.batch_size} x {args.length} tokens a step")
    print_table({name: {key: f"{value:.4g}" for key, value in row.items()} for name, row in rows.items()})
    write(args.json, f"train-{args.size}", vars(args) | {"layers": config.num_layers}, rows)


def _row(results: list[tuple[Timing, int | None]], config: DecoderConfig, args: argparse.Namespace) -> dict[str, float]:
    tokens = args.batch_size * args.length
    fastest, low, high = min(timing for timing, _ in results)
    row = {
        "ms": 1e3 * fastest,
        "low": 1e3 * low,
        "high": 1e3 * high,
        "slowest round": 1e3 * max(timing.median for timing, _ in results),
        "tokens/s": tokens / fastest,
    }
    known, peak = hardware.accelerator(torch.device(args.device)), results[0][1]
    if known:
        flops = flops_per_token(config, args.length) * tokens / fastest
        row |= {"MFU of bf16": flops / known.bf16, "MFU of FP8": flops / known.fp8}
    return row if peak is None else row | {"peak GiB": peak / 2**30}


if __name__ == "__main__":
    main()
