"""Pre-training with Fabric: the decoder of the quickstart, in FP8, in a plain loop.

    lightning-fp8 prepare --config configs/data/quickstart.yaml
    python examples/fabric_pretrain.py

The same model, data order, optimizer and schedule as `lightning-fp8 fit --config configs/quickstart.yaml`, so the same
loss, to the last bit. What makes it FP8 is two lines: the plugin and the optimizer. With `--recipe delayed` the plugin
also has a state, the scales; Fabric saves it with the rest, and the run resumes bit for bit:

    python examples/fabric_pretrain.py --recipe delayed --stop-at 200
    python examples/fabric_pretrain.py --recipe delayed --resume
"""

import argparse
import math
import time
from pathlib import Path

import torch
from lightning.fabric import Fabric, seed_everything
from torch.nn import functional as F

from lightning_fp8 import FabricFP8Precision
from lightning_fp8.data import TokenDataModule
from lightning_fp8.metrics import BitsPerByte
from lightning_fp8.models import Decoder, DecoderConfig
from lightning_fp8.optim import FP8AdamW, WarmupCosine, decay_groups


def main() -> None:
    args = parse_arguments()
    plugin = FabricFP8Precision(args.recipe, weights="bf16")
    fabric = Fabric(accelerator=args.accelerator, devices=1, plugins=[plugin])
    seed_everything(args.seed)
    data = TokenDataModule(args.data, sequence_length=128, batch_size=16)
    loader = fabric.setup_dataloaders(data.train_dataloader())

    with fabric.init_module():
        decoder = Decoder(DecoderConfig(vocab_size=data.vocab_size))
    # Names key the random bits of stochastic rounding: under the name that the LightningModule gives it, the decoder
    # is rounded as it is there.
    groups = decay_groups(torch.nn.ModuleDict({"decoder": decoder}))
    optimizer = FP8AdamW(groups, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    decoder, optimizer = fabric.setup(decoder, optimizer)
    schedule = WarmupCosine(warmup_steps=args.warmup, final_ratio=0.0).of(optimizer, args.steps)

    step, end, last = 0, args.stop_at or args.steps, args.checkpoint
    # Fabric saves no plugin by itself: with delayed scaling, or a schedule of precisions, name it here.
    state = {"model": decoder, "optimizer": optimizer, "schedule": schedule, "loader": loader, "fp8": plugin}
    if args.resume:
        step = fabric.load(last, state)["step"]
    started = time.perf_counter()
    while step < end:
        for batch in loader:
            logits = decoder(batch[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            fabric.backward(loss)
            fabric.clip_gradients(decoder, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            if step % 10 == 0:
                fabric.print(f"step {step:5}  loss {loss.item():.4f}  {time.perf_counter() - started:6.1f} s")
            if step % args.save_every == 0 or step == end:
                fabric.save(last, {**state, "step": step})
            if step == end:
                break
    evaluate(fabric, decoder, data)


@torch.no_grad()
def evaluate(fabric: Fabric, decoder: torch.nn.Module, data: TokenDataModule) -> None:
    """Prints loss and bits per byte on the held-out text."""
    total, count, bits = 0.0, 0, BitsPerByte(data.token_bytes())
    for batch in fabric.setup_dataloaders(data.val_dataloader()):
        logits, targets = decoder(batch[:, :-1]), batch[:, 1:]
        total += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum").item()
        count += targets.numel()
        bits.update(logits, targets)
    loss = total / count
    fabric.print(f"validation loss {loss:.4f}  perplexity {math.exp(loss):.2f}  bits per byte {bits.compute():.4f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/quickstart", help="a folder that `lightning-fp8 prepare` wrote")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps")
    parser.add_argument("--stop-at", type=int, help="stop there and save, as where a job's time is up")
    parser.add_argument("--recipe", default="tensorwise", help="how operands are scaled: a preset's name")
    parser.add_argument("--warmup", type=int, default=100, help="optimizer steps to the peak learning rate")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--accelerator", default="cpu", help="cpu, cuda, …")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/fabric/last.ckpt"), help="where it goes")
    parser.add_argument("--save-every", type=int, default=200, help="optimizer steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    return parser.parse_args()


if __name__ == "__main__":
    main()
