"""How far quantised moments push Adam's updates from fp32's, as one table.

    python benchmarks/moments.py                            # fp8, every row; some minutes
    python benchmarks/moments.py --formats e4m3 coat int8   # what other formats make of it
    python benchmarks/moments.py --quick                    # 200 steps only

Every format is replayed on the same gradients as fp32 moments; the update of a step is computed from the fresh moments,
as `FP8AdamW` does, and each step counts. The columns of a weight differ in gradient size by a log-normal factor of
sigma, and gradients are one of

    gaussian    normal numbers
    zipf        column number r fires in a share 1/r of the steps, and has no gradient in the others (rare tokens)
    heavy       each row of each step is multiplied by a draw of Student's t with 3 degrees of freedom

relL2 is the norm of the updates' error over that of the updates; "largest" is the largest error of a single update
where v is at least 2^-40 of its block's largest, "below" the share of the others; "lost" counts positive v that were
stored as 0. Rows of 200 columns make a ragged last block, and seeds 0, 1, 2 have gradients of RMS 1e-3, 1e-6, 1e-9.
"""

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_fp8.numerics.rounding import dither, parameter_key
from lightning_fp8.optim.blocks import Rows, gather
from lightning_fp8.optim.step import MOMENTS, Moments

BETA1, BLOCK = 0.9, 128
ROWS, COLUMNS = 8, 200
SCALES = (1e-3, 1e-6, 1e-9)
EPS = 1e-5  # of the gradients' RMS
GRADIENTS = ("gaussian", "zipf", "heavy")
SIGMAS = (0.0, 1.0, 2.0)
BETAS2 = (0.95, 0.99, 0.999)
SHORT = 200


class Int8Moments(NamedTuple):
    """FlashOptim's formats: companded int8 m and uint8 of sqrt(v), here with fp32 scales."""

    m_codes: Tensor
    m_scale: Tensor
    v_codes: Tensor
    v_scale: Tensor

    @classmethod
    def encode(cls, m: Tensor, v: Tensor, random: Tensor) -> "Int8Moments":
        """Rounds m and v, fp32 [n, b], to nearest."""
        root = v.sqrt()
        m_scale, v_scale = (x.abs().amax(1, keepdim=True).clamp_min(1e-38) for x in (m, root))
        unit = m / m_scale
        m_codes = (2 * unit / (1 + unit.abs()) * 127).round().to(torch.int8)
        return cls(m_codes, m_scale, (root / v_scale * 255).round().to(torch.uint8), v_scale)

    def decode(self) -> tuple[Tensor, Tensor]:
        """The moments (m, v), fp32 [n, b] each."""
        unit = self.m_codes.float() / 127
        return unit / (2 - unit.abs()) * self.m_scale, (self.v_codes.float() / 255 * self.v_scale).square()


FORMATS: dict[str, Any] = {**MOMENTS, "int8": Int8Moments}
BLOCKS = {"int8": 32}  # FlashOptim's


class Deviation(NamedTuple):
    """How far updates were from fp32's.

    Attributes:
        rel_l2: Norm of the error over the norm of the updates, all steps and elements.
        largest: Largest error of an update whose v is at least 2^-40 of its block's largest.
        below: Share of the elements below that.
        lost: How often a positive v was stored as 0.
        size: The mean size of the updates over fp32's.
    """

    rel_l2: float
    largest: float
    below: float
    lost: int
    size: float


def gradients(kind: str, sigma: float, seed: int, steps: int) -> Iterator[Tensor]:
    """Gradients fp32 [ROWS, COLUMNS] of so many steps, of the RMS that belongs to the seed."""
    gen = torch.Generator().manual_seed(seed)
    size = (torch.randn(COLUMNS, generator=gen) * sigma).exp()
    size *= SCALES[seed % len(SCALES)] / size.square().mean().sqrt()
    rate = 1 / (1 + torch.randperm(COLUMNS, generator=gen))
    for _ in range(steps):
        grad = torch.randn(ROWS, COLUMNS, generator=gen) * size
        if kind == "zipf":
            grad *= torch.rand(COLUMNS, generator=gen) < rate
        if kind == "heavy":
            normal = torch.randn(4, ROWS, 1, generator=gen)
            grad *= normal[0] / normal[1:].square().mean(0).sqrt()
        yield grad


def replay(
    form: str, *, kind: str, sigma: float, beta2: float, steps: tuple[int, ...], seeds: tuple[int, ...] = (0, 1, 2)
) -> dict[int, Deviation]:
    """What a format makes of the same gradients as fp32, after each of the numbers of `steps`.

    Args:
        form: One of `FORMATS`.
        kind: Of gradients.
        sigma: Spread of the columns.
        beta2: Decay of the second moment.
        steps: When to take stock, ascending.
        seeds: All are replayed at once.
    """
    block = BLOCKS.get(form, BLOCK)
    rows = [Rows(i, 0, ROWS) for i in range(len(seeds))]
    eps = gather([torch.full((ROWS, COLUMNS), EPS * SCALES[s % len(SCALES)]) for s in seeds], rows, block)
    inside = gather([torch.ones(ROWS, COLUMNS) for _ in seeds], rows, block) > 0
    thresholds = _thresholds(len(inside), block)
    streams = zip(*(gradients(kind, sigma, seed, steps[-1]) for seed in seeds), strict=True)
    m = v = torch.zeros(inside.shape)
    stored: Moments = FORMATS[form].encode(m, v, v)
    error = total = size = exact_size = largest = 0.0
    below = lost = 0
    found = {}
    for t, grads in enumerate(streams, 1):
        g = gather(grads, rows, block)
        m, v = _averages(m, v, g, beta2)
        quantized = _averages(*stored.decode(), g, beta2)
        u, quantized_u = (_update(*moments, eps, beta2, t) for moments in ((m, v), quantized))
        stored = FORMATS[form].encode(*quantized, next(thresholds))
        u, quantized_u = u[inside], quantized_u[inside]
        deviation = quantized_u - u
        reach = (v >= v.amax(1, keepdim=True) * 2.0**-40)[inside]
        error += deviation.double().square().sum().item()
        total += u.double().square().sum().item()
        size, exact_size = size + quantized_u.abs().sum().item(), exact_size + u.abs().sum().item()
        largest = max(largest, (deviation.abs() * reach).max().item())
        below += int((~reach & (v[inside] > 0)).sum())
        lost += int(((quantized[1] >= torch.finfo(torch.float32).tiny) & (stored.decode()[1] == 0)).sum())
        if t in steps:
            count = t * int(inside.sum())
            found[t] = Deviation((error / total) ** 0.5, largest, below / count, lost, size / exact_size)
    return found


def _averages(m: Tensor, v: Tensor, g: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    return m * BETA1 + g * (1 - BETA1), v * beta2 + g * g * (1 - beta2)


def _update(m: Tensor, v: Tensor, eps: Tensor, beta2: float, t: int) -> Tensor:
    return (m / (1 - BETA1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)


def _thresholds(blocks: int, block: int) -> Iterator[Tensor]:
    """What rounds v, step by step, as for a parameter of so many rows of one block."""
    keys = torch.tensor([parameter_key(0, "w")], dtype=torch.int32).expand(blocks, 2)
    row, column = torch.arange(blocks, dtype=torch.int32), torch.arange(block, dtype=torch.int32)
    step = torch.zeros_like(row)
    while True:
        step = step + 1
        yield dither(keys, step, row, column)


def table(forms: list[str], *, quick: bool = False) -> Iterator[str]:
    """The lines of the table, as Markdown."""
    yield "| format | gradients | sigma | beta2 | steps | relL2 % | largest | below % | lost | mean size |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for form in forms:
        for kind in GRADIENTS:
            for sigma in SIGMAS:
                for beta2 in BETAS2:
                    steps = sorted({SHORT} if quick else {SHORT, round(6 / (1 - beta2))})
                    for count, d in replay(form, kind=kind, sigma=sigma, beta2=beta2, steps=tuple(steps)).items():
                        yield (
                            f"| {form} | {kind} | {sigma:g} | {beta2} | {count} | {d.rel_l2:.2%} | {d.largest:.3f} "
                            f"| {d.below:.2%} | {d.lost} | {d.size:.4f} |"
                        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["fp8"])
    parser.add_argument("--quick", action="store_true", help="200 steps only")
    args = parser.parse_args()
    for line in table(args.formats, quick=args.quick):
        print(line, flush=True)


if __name__ == "__main__":
    main()
