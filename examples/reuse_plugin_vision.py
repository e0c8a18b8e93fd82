"""A vision transformer of torchvision in FP8, in a LightningModule that knows nothing of it.

    python examples/reuse_plugin_vision.py

The images are generated: a bar of one of eight directions in noise. What makes it FP8 is one line, the plugin. Of this
model the MLPs and the head run in FP8; torchvision's attention multiplies by its weights itself and stays in bf16.
"""

import argparse
import math

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VisionTransformer

from lightning_fp8 import FP8Precision

DIRECTIONS, SIZE = 8, 16


class Classifier(LightningModule):
    """As one would write it for any precision."""

    def __init__(self) -> None:
        super().__init__()
        self.net = VisionTransformer(
            image_size=SIZE, patch_size=4, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=16
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        correct = self.net(images).argmax(dim=1) == labels
        self.log("accuracy", correct.float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def images(count: int, seed: int) -> TensorDataset:
    """`count` images [3, SIZE, SIZE] of a bar through the middle, and its direction."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(DIRECTIONS, (count,), generator=generator)
    angle = (math.pi * labels / DIRECTIONS).view(-1, 1, 1)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, SIZE)] * 2, indexing="ij")
    bars = (-20 * (x * angle.sin() - y * angle.cos()) ** 2).exp()
    noise = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return TensorDataset(bars.unsqueeze(1) + 0.3 * noise, labels)


def main() -> None:
    args = parse_arguments()
    seed_everything(args.seed)
    trainer = Trainer(
        plugins=[FP8Precision(args.recipe)],
        accelerator=args.accelerator,
        devices=1,
        max_steps=args.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    model = Classifier()
    trainer.fit(model, DataLoader(images(4096, seed=1), batch_size=64, shuffle=True))
    trainer.validate(model, DataLoader(images(512, seed=2), batch_size=64), verbose=False)
    print(f"accuracy {trainer.callback_metrics['accuracy']:.3f}, by chance {1 / DIRECTIONS:.3f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tensorwise", help="a preset's name")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--accelerator", default="cpu", help="cpu, cuda, …")
    return parser.parse_args()


if __name__ == "__main__":
    main()
