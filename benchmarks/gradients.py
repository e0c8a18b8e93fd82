"""What averaging gradients in FP8 costs in precision: nearest and stochastic rounding, E4M3 and E5M2, headroom.

    python benchmarks/gradients.py [--ranks 8] [--steps 60]

Trains a decoder of 0.5 M parameters on random bigrams, in fp32, and averages the gradients that `--ranks` ranks would
have, in every way. Two figures, both relative L2 over all parameters, medians and totals of the steps after the first
ten: the error of one step's average, and the error that is left in the mean over all these steps' averages. What is
unbiased shrinks there with the number of steps; a bias stays. The bf16 row rounds each rank's gradient and each partial
sum of a ring to bf16, as NCCL does.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_fp8.distributed.reduction import (
    accumulate,
    decode_into,
    encode,
    largest_magnitudes,
    next_headroom,
    shared_scale,
)
from lightning_fp8.models import Decoder, DecoderConfig
from lightning_fp8.numerics import FORMATS, Format

Average = Callable[[list[list[Tensor]]], list[Tensor]]


def nearest(fmt: Format, *, fixed_headroom: bool) -> Average:
    """What the library does; with the headroom fixed at 1 / N or as it adapts."""
    headroom: Tensor | None = None

    def average(gradients: list[list[Tensor]]) -> list[Tensor]:
        nonlocal headroom
        ways, sizes = len(gradients), [g.numel() for g in gradients[0]]
        mu = torch.full((len(sizes),), 1 / ways) if headroom is None else headroom
        scale = shared_scale(torch.stack([largest_magnitudes(own) for own in gradients]).amax(0), fmt)
        sent = torch.stack([encode(own, scale, fmt, sum(sizes))[0] for own in gradients])
        ends = torch.tensor(sizes).cumsum(0).tolist()
        parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        codes, counts = accumulate(sent, parts, mu, fmt)
        result = [torch.empty_like(g) for g in gradients[0]]
        decode_into(result, codes, scale, mu, ways, fmt)
        if not fixed_headroom:
            headroom = next_headroom(mu, counts.saturated, torch.tensor(sizes), ways)
        return result

    return average


def stochastic(fmt: Format) -> Average:
    """Both casts rounded up or down with odds proportional to the distance, other random numbers on every rank."""

    def round_up_or_down(x: Tensor) -> Tensor:
        _, exponent = torch.frexp(x)
        step = (2.0 ** (exponent - 1 - fmt.mantissa_bits)).clamp_min(fmt.min_subnormal)
        return ((x / step + torch.rand_like(x)).floor() * step).clamp(-fmt.max, fmt.max)

    def average(gradients: list[list[Tensor]]) -> list[Tensor]:
        result = []
        for ranks in zip(*gradients, strict=True):
            s = torch.stack([g.abs().amax() for g in ranks]).amax() / fmt.max
            mean = torch.stack([round_up_or_down(g / s) for g in ranks]).mean(0)
            result.append(round_up_or_down(mean) * s)
        return result

    return average


def bf16_ring(gradients: list[list[Tensor]]) -> list[Tensor]:
    """Sums rank after rank, rounded to bf16 after every addition."""
    result = []
    for ranks in zip(*gradients, strict=True):
        total = ranks[0].bfloat16()
        for g in ranks[1:]:
            total = total + g.bfloat16()
        result.append((total / len(ranks)).float())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = DecoderConfig(vocab_size=512, hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=4)
    model = Decoder(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    table = torch.randn(512, 512).mul(2).softmax(-1)
    ways: dict[str, Average] = {"bf16 ring": bf16_ring}
    for name, fmt in FORMATS.items():
        ways[f"{name}, nearest"] = nearest(fmt, fixed_headroom=False)
        ways[f"{name}, nearest, headroom 1 / N"] = nearest(fmt, fixed_headroom=True)
        ways[f"{name}, stochastic"] = stochastic(fmt)
    errors: dict[str, list[float]] = {name: [] for name in ways}
    drift = {name: [torch.zeros_like(p) for p in model.parameters()] for name in ways}
    true_sum = [torch.zeros_like(p) for p in model.parameters()]
    for step in range(args.steps):
        gradients = [_gradients(model, table) for _ in range(args.ranks)]
        exact = [torch.stack(ranks).double().mean(0).float() for ranks in zip(*gradients, strict=True)]
        for name, average in ways.items():
            found = average(gradients)
            if step >= 10:
                errors[name].append(_norm(_minus(found, exact)) / _norm(exact))
                torch._foreach_add_(drift[name], _minus(found, exact))
        if step >= 10:
            torch._foreach_add_(true_sum, exact)
        for p, g in zip(model.parameters(), exact, strict=True):
            p.grad = g
        optimizer.step()
    print(f"{args.ranks} ranks; relative L2 error of {args.steps - 10} steps")
    print(f"{'':32} one step   mean of the steps")
    for name, found in errors.items():
        print(f"{name:32} {torch.tensor(found).median():8.3%}   {_norm(drift[name]) / _norm(true_sum):8.3%}")


def _gradients(model: Decoder, table: Tensor) -> list[Tensor]:
    tokens = [torch.randint(512, (8,))]
    for _ in range(64):
        tokens.append(torch.multinomial(table[tokens[-1]], 1).squeeze(1))
    batch = torch.stack(tokens, dim=1)
    return list(torch.autograd.grad(model(batch[:, :-1], batch[:, 1:]), list(model.parameters())))


def _minus(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_sub(a, b))


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack(torch._foreach_norm(tensors)).norm())


if __name__ == "__main__":
    main()
