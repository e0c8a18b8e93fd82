"""What training a decoder's blocks keeps and needs in memory: BF16, FP8, FP8 activations, recomputation.

    python benchmarks/memory.py [--hidden-size 4096 --length 4096] [--json results/memory.json]

`kept` is what is still there when forward is over, weights not counted; `peak` the most there was at one time of
forward and backward, gradients included. Both are counted from what torch allocates, so they are the same on a busy
machine.
"""

import argparse
from pathlib import Path

import torch
from measuring import print_table, write
from torch.profiler import ProfilerActivity, profile

from lightning_fp8 import convert_linears
from lightning_fp8.compute.activations import keep_activations_in_fp8
from lightning_fp8.models import Decoder, DecoderConfig
from lightning_fp8.models.recompute import Recompute

PATTERNS = ("*.mlp", "*_norm")
# name -> FP8 linear layers, FP8 activations, recomputation
ARMS: dict[str, tuple[bool, bool, Recompute]] = {
    "bf16": (False, False, "none"),
    "fp8": (True, False, "none"),
    "fp8, fp8 activations": (True, True, "none"),
    "bf16, selective": (False, False, "selective"),
    "fp8, selective": (True, False, "selective"),
    "bf16, full": (False, False, "full"),
    "fp8, full": (True, False, "full"),
}


def measure(config: DecoderConfig, batch: int, length: int, device: str, arm: str) -> tuple[int, int]:
    """Bytes kept after forward, and the peak of a whole step."""
    fp8, activations, recompute = ARMS[arm]
    torch.manual_seed(0)
    decoder = Decoder(config, activation_checkpointing=recompute).to(device, torch.bfloat16)
    if fp8:
        convert_linears(decoder)
    if activations:
        keep_activations_in_fp8(decoder, PATTERNS)
    tokens = torch.randint(config.vocab_size, (batch, length + 1), device=device)
    if device == "cuda":
        decoder(tokens[:, :-1], tokens[:, 1:]).backward()  # workspaces come into being
        decoder.zero_grad()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = decoder(tokens[:, :-1], tokens[:, 1:])
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        return kept, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = decoder(tokens[:, :-1], tokens[:, 1:])
    changes = _changes(profiler)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss.backward()
    kept, peak = sum(changes), _highest(changes)
    return kept, max(peak, kept + _highest(_changes(profiler)))


def _changes(profiler: profile) -> list[int]:
    events = profiler.profiler.kineto_results.events()
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]


def _highest(changes: list[int]) -> int:
    held = peak = 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return peak


def main() -> None:
    on_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if on_cuda else "cpu")
    parser.add_argument("--hidden-size", type=int, default=4096 if on_cuda else 256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=1 if on_cuda else 4)
    parser.add_argument("--length", type=int, default=4096 if on_cuda else 256)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    heads = max(2, args.hidden_size // 128)
    config = DecoderConfig(
        vocab_size=2048,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 11 // 64 * 16,
        num_layers=args.layers,
        num_heads=heads,
        num_kv_heads=heads,
    )
    rows = {}
    for arm in ARMS:
        kept, peak = measure(config, args.batch_size, args.length, args.device, arm)
        plain = rows["bf16"] if rows else {"kept MiB": kept / 2**20, "peak MiB": peak / 2**20}
        rows[arm] = {"kept MiB": kept / 2**20, "x bf16": kept / 2**20 / plain["kept MiB"], "peak MiB": peak / 2**20}
        rows[arm]["peak x bf16"] = rows[arm]["peak MiB"] / plain["peak MiB"]
    print(f"{args.layers} layers of {args.hidden_size}, {args.batch_size} x {args.length} tokens, {args.device}")
    print_table({name: {key: f"{value:.3g}" for key, value in row.items()} for name, row in rows.items()})
    write(args.json, "memory", vars(args), rows)


if __name__ == "__main__":
    main()
