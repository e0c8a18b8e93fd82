"""Pre-training with Fabric, sharded by FSDP2 over several processes, in FP8 and gathered in FP8.

    lightning-fp8 prepare --config configs/data/quickstart.yaml
    torchrun --nproc-per-node 2 examples/fsdp2_pretrain.py

The same model, data order, optimizer and schedule as the quickstart's on as many processes, so the same loss:

    torchrun --nproc-per-node 2 -m lightning_fp8 fit -c configs/quickstart.yaml -c configs/strategy/fsdp2.yaml \
        --trainer.devices 2 --fp8.fp8_all_gather true
"""

import argparse
import os
from pathlib import Path

import torch
from lightning.fabric import Fabric, seed_everything
from lightning.fabric.strategies import ModelParallelStrategy
from torch import nn
from torch.nn import functional as F

from lightning_fp8 import FabricFP8Precision
from lightning_fp8.checkpoint import load_fabric_state
from lightning_fp8.data import TokenDataModule
from lightning_fp8.models import Decoder, DecoderConfig
from lightning_fp8.models.sharding import materialize, shard
from lightning_fp8.optim import FP8AdamW, WarmupCosine, decay_groups


def main() -> None:
    args = parse_arguments()
    processes = int(os.environ["WORLD_SIZE"])
    device = torch.device(args.accelerator, int(os.environ["LOCAL_RANK"])) if args.accelerator != "cpu" else None

    def parallelize(decoder, mesh):
        return materialize(shard(decoder, mesh["data_parallel"]), device or torch.device("cpu"))

    fabric = Fabric(
        accelerator=args.accelerator,
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=processes // int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy=ModelParallelStrategy(parallelize, data_parallel_size=processes, tensor_parallel_size=1),
        plugins=[FabricFP8Precision(weights="bf16", fp8_all_gather=True)],
    )
    fabric.launch()
    seed_everything(args.seed)
    data = TokenDataModule(args.data, sequence_length=128, batch_size=16)
    # The loader gives each process its own blocks by itself.
    loader = fabric.setup_dataloaders(data.train_dataloader(), use_distributed_sampler=False)

    with fabric.init_module(empty_init=True):  # on the meta device: `parallelize` gives it memory
        decoder = Decoder(DecoderConfig(vocab_size=data.vocab_size))
    decoder = fabric.setup_module(decoder)
    # The names that the LightningModule gives: they key the random bits of stochastic rounding.
    groups = decay_groups(nn.ModuleDict({"decoder": decoder.module}))
    optimizer = FP8AdamW(groups, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = fabric.setup_optimizers(optimizer)
    schedule = WarmupCosine(warmup_steps=args.warmup, final_ratio=0.0).of(optimizer, args.steps)

    step, state = 0, {"model": decoder, "optimizer": optimizer, "schedule": schedule, "loader": loader}
    if args.resume:
        step = load_fabric_state(fabric, args.checkpoint, state)["step"]
    end = args.stop_at or args.steps
    while step < end:
        for batch in loader:
            loss = F.cross_entropy(decoder(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())
            fabric.backward(loss)
            nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            mean = fabric.all_reduce(loss.detach(), reduce_op="mean")
            if step % args.print_every == 0:
                fabric.print(f"step {step:5}  loss {mean.item():.6f}")
            if step == end:
                break
    fabric.save(args.checkpoint, {**state, "step": step})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/quickstart", help="a folder that `lightning-fp8 prepare` wrote")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps")
    parser.add_argument("--warmup", type=int, default=100, help="optimizer steps to the peak learning rate")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--print-every", type=int, default=10, help="optimizer steps between losses")
    parser.add_argument("--accelerator", default="cpu", help="cpu, cuda, …")
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/fsdp2/last.ckpt"), help="a folder, sharded")
    parser.add_argument("--stop-at", type=int, help="stop there and save, as where a job's time is up")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    return parser.parse_args()


if __name__ == "__main__":
    main()
