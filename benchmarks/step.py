"""What emulating FP8 costs on this device: the quickstart's training step in FP8 and in BF16.

    python benchmarks/step.py [--json results/step.json]

Both arms have bf16 weights and the same optimizer.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import Timing, interleaved, print_table, write
from torch.nn import functional as F

from lightning_fp8 import convert_linears, hardware
from lightning_fp8.models import Decoder, DecoderConfig
from lightning_fp8.optim import FP8AdamW, decay_groups


def step_of(fp8: bool, batch_size: int, length: int, device: torch.device) -> Callable[[], None]:
    """A whole step: forward, backward, clipping, update."""
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig()).to(device, torch.bfloat16)
    if fp8:
        convert_linears(decoder)
    optimizer = FP8AdamW(decay_groups(decoder), lr=1e-3)
    tokens = torch.randint(0, DecoderConfig().vocab_size, (batch_size, length + 1), device=device)

    def step() -> None:
        optimizer.zero_grad()
        logits = decoder(tokens[:, :-1]).flatten(0, 1)
        F.cross_entropy(logits.float(), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()

    return step


def measure(batch_size: int, length: int, repeats: int, device: torch.device) -> dict[str, Timing]:
    """Seconds a step of each arm."""
    arms = {name: step_of(name == "fp8", batch_size, length, device) for name in ("bf16", "fp8")}
    return interleaved(arms, device, repeats=repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=hardware.device_type())
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    timings = measure(args.batch_size, args.length, args.repeats, torch.device(args.device))
    rows = {
        name: {
            "ms": 1e3 * timing.median,
            "low": 1e3 * timing.low,
            "high": 1e3 * timing.high,
            "tokens/s": args.batch_size * args.length / timing.median,
            "/ bf16": timing.median / timings["bf16"].median,
        }
        for name, timing in timings.items()
    }
    print(f"The quickstart's model, {args.batch_size} x {args.length} tokens, {hardware.describe_device()}")
    print_table({name: {key: f"{value:.4g}" for key, value in row.items()} for name, row in rows.items()})
    write(args.json, "step", vars(args), rows)


if __name__ == "__main__":
    main()
