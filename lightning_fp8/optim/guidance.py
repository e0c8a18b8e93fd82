"""Which eps and beta2 are safe for the way in which second moments are kept.

Two things go wrong with a v of few bits, and both depend on hyperparameters.

**v is lost.** Below a share f of hi, the largest v of its block, a v is stored as 0, while its m is not. It stays so
while (1 - beta2) g^2 < f hi, and in that time m comes to be g. When a gradient of 0 follows, the update is
beta1 m / eps: up to beta1 sqrt(f hi / (1 - beta2)) / eps. `safe_eps` solves that for eps. It grows with the gradients
of the block, so no eps is safe everywhere: Hugging Face's 1e-7 bounds what 1e-8 does not, and takes from every small
gradient its adaptivity. A format that loses no v needs no eps but for 0 / 0.

**v does not fall.** A v that is rounded to nearest stays where it is while a step's decay, 1 - beta2, is less than half
of its last bit: from then on it is too large, and updates are too small. (Relative to its block: a block that falls as
a whole takes its scale along.) Stochastic rounding follows any beta2.

| moments          | f        | largest beta2 | why                                                             |
|------------------|----------|---------------|-----------------------------------------------------------------|
| "fp8"            | 0        | any           | a power law over the block's own range; rounds stochastically   |
| "coat"           | 0        | 0.944         | a power, which k < 1 makes coarser still; rounds to nearest     |
| "e4m3"           | 2^-18.8  | 0.944 = 17/18 | half of the last bit of 1.125 is 1/18                           |
| "e4m3/e5m2"      | 2^-32.8  | 0.9 = 9/10    | half of the last bit of 1.25 is 1/10                            |
| "fp8_lm"         | 2^-41    | 0.9995        | fp16 with a scale, rounded to nearest                           |
| "bf16", "fp32"   | 0        | any           | fp32's range; bf16 rounds stochastically                        |
"""

import math
import warnings
from typing import NamedTuple


class Storage(NamedTuple):
    """How second moments are kept.

    Attributes:
        lost: The share of its block's largest below which a v is stored as 0.
        largest_beta2: With which every v still falls.
    """

    lost: float
    largest_beta2: float


# Below half of the smallest positive number a magnitude rounds to 0: 2^-10 of 448, 2^-17 of 57344, 2^-25 of 65504.
STORAGES = {
    "fp8": Storage(0.0, 1.0),
    "coat": Storage(0.0, 17 / 18),
    "e4m3": Storage(2.0**-10 / 448, 17 / 18),
    "e4m3/e5m2": Storage(2.0**-17 / 57344, 9 / 10),
    "fp8_lm": Storage(2.0**-25 / 65504, 1 - 2.0**-11),
    "bf16": Storage(0.0, 1.0),
    "fp32": Storage(0.0, 1.0),
}


def safe_eps(moments: str, largest_v: float, betas: tuple[float, float], max_update: float = 5.0) -> float:
    """The eps from which on an element whose v was lost cannot move by more than `max_update` learning rates.

    Args:
        moments: As of `FP8AdamW`.
        largest_v: In a block of moments: about the square of its largest usual gradients.
        betas: Of Adam, beta1 <= beta2; the bound is of late steps, when bias correction is 1.
        max_update: Learning rates; without losses |u| stays below 1.2 or so.

    Raises:
        ValueError: Unknown `moments`, or betas for which no bound exists.
    """
    beta1, beta2 = betas
    if moments not in STORAGES or not 0 <= beta1 <= beta2 < 1:
        raise ValueError(f"safe_eps: moments {moments!r} must be one of {', '.join(STORAGES)}, and beta1 <= beta2 < 1.")
    largest_m = (1 + 2**-4) * math.sqrt(STORAGES[moments].lost * largest_v / (1 - beta2))  # as E4M3 may round it
    return beta1 * largest_m / max_update


def moment_hazards(moments: str, betas: tuple[float, float], eps: float) -> list[str]:
    """What may go wrong with second moments that are kept so, each with its remedy; empty where nothing can."""
    lost, largest_beta2 = STORAGES[moments]
    hazards = []
    if lost > 2.0**-40 and eps < 1e-7:
        hazards.append(
            f"a v below 2^{math.log2(lost):.1f} of the largest of its block is lost, and its update is then m / eps:"
            f' eps {eps:g} is no bound. Use moments="fp8", or eps of 1e-7 and more (optim.guidance.safe_eps).'
        )
    if betas[1] > largest_beta2:
        hazards.append(
            f"v rounds to nearest and may not fall with beta2 {betas[1]:g}: updates become too small. Use"
            f' moments="fp8", which rounds stochastically, or beta2 of {largest_beta2:.3g} and less.'
        )
    return hazards


def warn_of_moments(moments: str, betas: tuple[float, float], eps: float) -> None:
    """Warns of each hazard."""
    for hazard in moment_hazards(moments, betas, eps):
        warnings.warn(f"FP8AdamW(moments={moments!r}): {hazard}", stacklevel=2)
