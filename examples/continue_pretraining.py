"""Goes on training somebody else's model: Hugging Face weights in, FP8 training, Hugging Face weights out.

    lightning-fp8 prepare --config configs/data/quickstart.yaml
    python examples/continue_pretraining.py                       # a small Llama with random weights, made here
    lightning-fp8 prepare --tokenizer MODEL/tokenizer.json --sources text/ --output_dir data/mine
    python examples/continue_pretraining.py --model MODEL --data data/mine --lr 2e-5

On the command line the same is `lightning-fp8 import MODEL OUTPUT`, `lightning-fp8 fit -c CONFIG -c OUTPUT/model.yaml`
and `lightning-fp8 export CKPT DIR`. A model that was trained already wants a lower learning rate than a fresh one, and
a short warm-up, because moments start from nothing.
"""

import argparse
import functools
from pathlib import Path

import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_fp8 import FP8Precision
from lightning_fp8.checkpoint import export_checkpoint, import_checkpoint
from lightning_fp8.data import TokenDataModule
from lightning_fp8.models import DecoderConfig, DecoderLM
from lightning_fp8.optim import FP8AdamW, WarmupCosine


def small_llama(folder: Path, vocab_size: int) -> None:
    """Writes a Llama with random weights, as a stand-in for one that was trained."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)


@torch.no_grad()
def loss(folder: Path, data: TokenDataModule) -> float:
    """Of the model in `folder` as transformers computes it, over the first held-out batch; nats a token."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    batch = next(iter(data.val_dataloader()))
    logits = model(batch[:, :-1]).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item()


def main() -> None:
    args = parse_arguments()
    seed_everything(args.seed)
    data = TokenDataModule(args.data, sequence_length=128, batch_size=16)
    source = args.model or args.output / "source"
    if args.model is None:
        small_llama(source, data.vocab_size)

    import_checkpoint(str(source), str(args.output / "imported"))
    overlay = yaml.safe_load((args.output / "imported/model.yaml").read_text())["model"]
    model = DecoderLM(
        DecoderConfig(**overlay["config"]),
        optimizer=functools.partial(FP8AdamW, lr=args.lr, betas=(0.9, 0.95)),
        schedule=WarmupCosine(warmup_steps=args.steps // 10),
        initial_weights=overlay["initial_weights"],
    )
    trainer = Trainer(
        plugins=[FP8Precision(weights="bf16")],
        accelerator=args.accelerator,
        devices=1,
        max_steps=args.steps,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, datamodule=data)
    checkpoint = args.output / "imported/checkpoints/trained.ckpt"  # beside the tokenizer, which goes along
    trainer.save_checkpoint(checkpoint)
    export_checkpoint(str(checkpoint), str(args.output / "exported"))
    print(
        f"loss {loss(source, data):.4f} before, {loss(args.output / 'exported', data):.4f} after, both by transformers"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with config.json and safetensors; none makes a small one")
    parser.add_argument("--data", default="data/quickstart", help="a folder prepared with the model's tokenizer")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/continued"), help="where everything goes; a new folder"
    )
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of what is random")
    parser.add_argument("--accelerator", default="cpu", help="cpu, cuda, …")
    return parser.parse_args()


if __name__ == "__main__":
    main()
