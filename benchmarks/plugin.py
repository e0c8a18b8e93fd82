"""What the plugin costs a training step beside plain bf16: time, and tokens a second, through Fabric.

    python benchmarks/plugin.py [--accelerator cuda] [--hidden-size 2048] [--compile] [--json results.json]

Both arms have the same decoder, data and optimizer; steps of the two alternate, so that what else the machine does
falls on both, and medians are compared. On devices without FP8 GEMMs they are emulated, and what this prints is the
price of that.
"""

import argparse
import json
import platform
import statistics
import time
import warnings
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch.nn import functional as F

from lightning_fp8 import FabricFP8Precision, hardware
from lightning_fp8.models import Decoder, DecoderConfig
from lightning_fp8.models.accounting import flops_per_token

warnings.filterwarnings("ignore", ".*rounds them to nearest.*")  # it is time that counts here


def main() -> None:
    args = parse_arguments()
    config = DecoderConfig(
        vocab_size=2048,
        hidden_size=args.hidden_size,
        num_layers=args.layers,
        num_heads=args.hidden_size // 64,
        num_kv_heads=args.hidden_size // 64,
        intermediate_size=3 * args.hidden_size,
    )
    arms = {"bf16": {"precision": "bf16-true"}}
    arms |= {f"fp8 {name}": {"plugins": [FabricFP8Precision(name, weights="bf16")]} for name in args.recipes}
    steps = {name: build(config, args, options) for name, options in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(args.repeats + 3):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if repeat >= 3:  # the first ones compile, choose kernels and fill caches
                seconds[name].append(time.perf_counter() - started)
    tokens = args.batch_size * args.length
    flops = flops_per_token(config, args.length)
    print(f"{hardware.describe_device()}; FP8 GEMMs {hardware.describe_fp8()}; {tokens} tokens a step")
    plain, results = statistics.median(seconds["bf16"]), {}
    for name, times in seconds.items():
        low, median, high = statistics.quantiles(times, n=4)
        speed = {"tokens_per_second": tokens / median, "flops_per_second": flops * tokens / median}
        results[name] = {"seconds": median, "quartiles": [low, high], **speed, "of_bf16": plain / median}
        rate = f"{tokens / median:10,.0f} tokens/s  {speed['flops_per_second'] / 1e12:8.2f} TFLOP/s"
        print(f"{name:18} {1e3 * median:9.2f} ms a step  {rate}  {plain / median:5.2f} x bf16")
    if args.json:
        facts = {
            "device": hardware.describe_device(),
            "fp8_gemms": hardware.describe_fp8(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "setting": {name: value for name, value in vars(args).items() if name != "json"},
        }
        args.json.write_text(json.dumps(facts | {"arms": results}, indent=2) + "\n")


def build(config: DecoderConfig, args: argparse.Namespace, options: dict):
    """A function that makes one training step."""
    torch.manual_seed(0)
    fabric = Fabric(accelerator=args.accelerator, devices=1, **options)
    decoder = Decoder(config)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-4, foreach=True)
    model, optimizer = fabric.setup(torch.compile(decoder) if args.compile else decoder, optimizer)
    tokens = torch.randint(config.vocab_size, (args.batch_size, args.length + 1), device=fabric.device)

    def step() -> None:
        logits = model(tokens[:, :-1])
        fabric.backward(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
        optimizer.step()
        optimizer.zero_grad()
        hardware.wait_for(fabric.device)

    return step


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="cpu", help="cpu, cuda, …")
    parser.add_argument("--recipes", nargs="+", default=["tensorwise", "delayed"], help="names of presets")
    parser.add_argument("--hidden-size", type=int, default=256, help="of the decoder; a multiple of 64")
    parser.add_argument("--layers", type=int, default=2, help="of the decoder")
    parser.add_argument("--length", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences a step")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps of each arm")
    parser.add_argument("--compile", action="store_true", help="torch.compile the decoder")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
