"""Tables that the reference makes and kernels look up: what is expensive to compute, or cannot be in fp32."""

import functools

import torch
from torch import Tensor

from lightning_fp8.numerics import elementary

_DENSITIES = 65  # of `numerics.moments.FP8Moments.v_density`: 4 codes an octave, then in eighths of an octave


@functools.cache
def roots(device: torch.device) -> Tensor:
    """Roots of the lattice points within an octave of roots, 2^(i / (2 k)), fp32, one density after the other.

    With 2 k = (8 + f) 2^e codes in an octave of roots, e octaves and f eighths of the density's byte, a density's begin
    at 92 (2^e - 1) + 2^e f (15 + f) / 2. A hundred kilobytes; those of usual densities are a few cache lines.
    """
    periods = [(8 + density % 8) << (density // 8) for density in range(_DENSITIES)]
    found = []
    for period in periods:
        step = torch.tensor(period, dtype=torch.float64).reciprocal().float()
        fraction = torch.arange(period).float() * step
        found.append(elementary.exp2(torch.zeros(period), fraction))
    return torch.cat(found).to(device)
