"""What emulating FP8 costs on this device: the quickstart's training step in FP8 and in BF16.

    python benchmarks/step.py

Both arms have bf16 weights and the same optimizer; blocks of steps are interleaved, so that a machine whose speed
drifts is fair to both, and medians are compared.
"""

import argparse
import statistics
import time

import torch
from torch.nn import functional as F

from lightning_fp8 import convert_linears
from lightning_fp8.models import Decoder, DecoderConfig
from lightning_fp8.optim import FP8AdamW, decay_groups

BATCH, LENGTH = 16, 128


def measure(blocks: int = 8, steps: int = 4, device: str = "cpu") -> dict[str, float]:
    """Median seconds a step of each arm."""
    tokens = torch.randint(0, DecoderConfig().vocab_size, (BATCH, LENGTH + 1), device=device)
    arms = {name: _build(fp8=name == "fp8", device=device) for name in ("fp8", "bf16")}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for block in range(blocks + 1):
        for name, (decoder, optimizer) in arms.items():
            for _ in range(steps):
                started = time.perf_counter()
                optimizer.zero_grad()
                logits = decoder(tokens[:, :-1]).flatten(0, 1)
                F.cross_entropy(logits.float(), tokens[:, 1:].flatten()).backward()
                torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
                optimizer.step()
                if device != "cpu":
                    torch.cuda.synchronize()
                if block:  # the first block warms up
                    seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _build(*, fp8: bool, device: str) -> tuple[Decoder, FP8AdamW]:
    decoder = Decoder(DecoderConfig()).to(device, torch.bfloat16)
    if fp8:
        convert_linears(decoder)
    return decoder, FP8AdamW(decay_groups(decoder), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--blocks", type=int, default=8, help="interleaved blocks of 4 steps")
    args = parser.parse_args()
    seconds = measure(args.blocks, device=args.device)
    for name, value in seconds.items():
        print(f"{name:5} {value * 1e3:8.1f} ms a step   {BATCH * LENGTH / value:8,.0f} tokens/s")
    print(f"FP8 / BF16: {seconds['fp8'] / seconds['bf16']:.2f}")


if __name__ == "__main__":
    main()
