"""`FP8AdamW` alone, in a plain torch loop: no plugin, no FP8 GEMM, no Lightning.

    python examples/optimizer_only.py                 # beside torch's AdamW with fp32 weights
    python examples/optimizer_only.py --release       # gradients are freed in backward: 4 bytes a parameter

The model is a small classifier of generated points, trained twice from the same weights on the same batches: once as
torch would, in fp32, and once with bf16 weights, stochastic rounding and moments of one byte each.
"""

import argparse
import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fp8.optim import FP8AdamW, enable_gradient_release
from lightning_fp8.optim.ledger import measure_ledger

FEATURES, CLASSES = 64, 16


def batch(seed: int, size: int = 256) -> tuple[Tensor, Tensor]:
    """Points around one centre a class, x [size, FEATURES] in fp32 and y [size]."""
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (size,), generator=generator)
    return centres[y] + 3.0 * torch.randn(size, FEATURES, generator=generator), y


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, *, release: bool = False) -> float:
    """Trains and returns the loss on points not trained on, in nats; prints what a parameter takes."""
    dtype = next(model.parameters()).dtype
    if release:  # the optimizer then steps inside backward, a parameter at a time; step() only counts
        enable_gradient_release(model, optimizer)
    for step in range(steps):
        x, y = batch(seed=1 + step)
        F.cross_entropy(model(x.to(dtype)).float(), y).backward()
        if step == steps - 1:
            after_backward = measure_ledger(model.parameters(), [optimizer])
            print(
                f"  {after_backward.total:.2f} bytes a parameter after backward: {after_backward.weights:.2f} weights,"
                f" {after_backward.grads:.2f} gradients, {after_backward.moments + after_backward.scales:.2f} moments"
            )
        optimizer.step()
        optimizer.zero_grad()
    x, y = batch(seed=0, size=4096)
    with torch.no_grad():
        return F.cross_entropy(model(x.to(dtype)).float(), y).item()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    reference = nn.Sequential(
        nn.Linear(FEATURES, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, CLASSES)
    )
    model = copy.deepcopy(reference).to(torch.bfloat16)

    print("torch.optim.AdamW, fp32 weights")
    expected = train(reference, torch.optim.AdamW(reference.parameters(), lr=args.lr), args.steps)
    print("FP8AdamW, bf16 weights")
    optimizer = FP8AdamW(model.named_parameters(), lr=args.lr)  # names key the random bits of the rounding
    found = train(model, optimizer, args.steps, release=args.release)
    print(f"loss {found:.4f} beside {expected:.4f}, by chance {torch.tensor(float(CLASSES)).log():.4f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--release", action="store_true", help="step in backward and free each gradient")
    return parser.parse_args()


if __name__ == "__main__":
    main()
