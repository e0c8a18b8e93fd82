"""StableAdamW's limit on the size of an update, over whole parameters.

The learning rate of a parameter is divided, for one step, by how far the root mean square of g / max(sqrt(v), eps)
exceeds a limit (Wortsman et al., "Stable and low-precision training for large-scale vision-language models",
algorithm 2). That is a mean over the parameter, all its shards included: each process sums over what it holds, and one
collective operation adds up the sums of all parameters that are cut alike.

Sums are of blocks and in fp64, so that they do not depend on how a parameter is cut into chunks or shards, but for the
rare sum that lies at the edge of fp32's rounding.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fp8.optim.packing import Member, alike, squared_updates
from lightning_fp8.optim.shards import sums_over_shards


def with_clipped_rates(
    members: Sequence[Member], params: Sequence[Tensor], group: dict[str, Any], factor: Tensor | None = None
) -> list[Member]:
    """The `members` with learning rates of their own, as `clip_update_rms` of their `group` asks.

    A pass over gradients and moments: the mean is needed before the first block is stepped.

    Args:
        members: Of one group, their steps counted.
        params: Of each, the whole parameter.
        group: Its options.
        factor: If given, what gradients are multiplied by, an fp32 scalar.
    """
    found: dict[int, Tensor] = {}
    for batch in alike(members):
        found.update(
            (id(member), squares) for member, squares in zip(batch, squared_updates(batch, group, factor), strict=True)
        )
    # A process that holds nothing of a parameter takes part in its sum all the same.
    parts = [found.get(id(m), torch.zeros((), dtype=torch.float64, device=m.weight.device)) for m in members]
    means = [total / max(1, p.numel()) for total, p in zip(sums_over_shards(parts, params), params, strict=True)]
    excesses = [mean.sqrt().div(group["clip_update_rms"]).clamp_min(1).reshape(1) for mean in means]
    rates = [(group["lr"] / excess).float() for excess in excesses]
    return [member._replace(rate=rate) for member, rate in zip(members, rates, strict=True)]
