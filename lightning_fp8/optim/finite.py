"""Skips the steps whose gradients are not finite, without asking the device.

One bad gradient would stay in the moments for ever, so the whole step is masked: all groups, all parameters, and the
step counts too. What a skipped step leaves is, bit for bit, what was there before it. The flag is computed where the
gradients are and is never read by the host; on a CPU, where reading is free, the step is left out instead.

A gradient beyond 2^63 counts as not finite: its square would overflow in fp32, and an infinite v makes a block's
updates zero ever after.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_GRADIENT = 2.0**63


def all_finite(grads: Sequence[Tensor]) -> Tensor:
    """Whether no element of any gradient is NaN, infinite or beyond 2^63: a bool scalar on the first one's device."""
    extremes: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        if grad.numel():
            extremes.setdefault((grad.device, grad.dtype), []).extend(torch.aminmax(grad))  # both are NaN if any is
    device = grads[0].device
    flags = [(torch.stack(values).abs() <= LARGEST_GRADIENT).all().to(device) for values in extremes.values()]
    return torch.stack(flags).all() if flags else torch.ones((), dtype=torch.bool, device=device)


def count_skips(counts: Tensor | None, finite: Tensor) -> Tensor:
    """The number of skipped steps in all and the number since the last step that was not, int64 [2].

    Args:
        counts: As returned after the last step; None before the first.
        finite: Whether this step is taken, a bool scalar.
    """
    skipped = (~finite).long()
    if counts is None:
        return skipped.repeat(2)
    return torch.stack([counts[0] + skipped, (counts[1] + 1) * skipped])


def keep_unless(finite: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """`new` where the step is taken, else `old`; None is a step that is known to be taken."""
    return new if finite is None else torch.where(finite, new, old)
