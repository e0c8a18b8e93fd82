"""A Llama of Hugging Face's transformers in FP8, in a LightningModule that knows nothing of it.

    python examples/reuse_plugin_hf.py

Weights are random and tokens generated: each is the one before, plus a step that the sequence keeps. What makes it FP8
is two lines: the plugin, and the optimizer that rounds bf16 weights stochastically and keeps its moments in FP8.
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_fp8 import FP8Precision
from lightning_fp8.optim import FP8AdamW

VOCABULARY = 64


class Llama(LightningModule):
    """As one would write it for any precision, but for its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        self.model = LlamaForCausalLM(config)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch[0], labels=batch[0]).loss
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", self.model(input_ids=batch[0], labels=batch[0]).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return FP8AdamW(self.named_parameters(), lr=5e-3, betas=(0.9, 0.95))


def sequences(count: int, seed: int, length: int = 32) -> TensorDataset:
    """`count` sequences of tokens, each with a start and a step of its own."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(VOCABULARY, (count, 1), generator=generator)
    step = torch.randint(1, 9, (count, 1), generator=generator)
    return TensorDataset((start + step * torch.arange(length)) % VOCABULARY)


def main() -> None:
    args = parse_arguments()
    seed_everything(args.seed)
    trainer = Trainer(
        plugins=[FP8Precision(args.recipe, weights="bf16")],
        accelerator=args.accelerator,
        devices=1,
        max_steps=args.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    model = Llama()
    trainer.fit(model, DataLoader(sequences(4096, seed=1), batch_size=32, shuffle=True))
    trainer.validate(model, DataLoader(sequences(256, seed=2), batch_size=32), verbose=False)
    print(f"loss {trainer.callback_metrics['loss']:.3f} nats a token, by chance {torch.tensor(VOCABULARY).log():.3f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tensorwise", help="a preset's name")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--accelerator", default="cpu", help="cpu, cuda, …")
    return parser.parse_args()


if __name__ == "__main__":
    main()
