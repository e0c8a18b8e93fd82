"""Skips the steps whose gradients are not finite, without waiting for the device.

One bad gradient would stay in the moments for ever, so the whole step is masked: all groups, all parameters, and the
step counts too. What a skipped step leaves is, bit for bit, what was there before it. The flag is computed where the
gradients are, and where they are sharded it is reduced over their processes, so that all skip or none: a shard that
goes on alone would have another step count and other random bits than the rest. The host never waits for the flag; on
a CPU, where reading is free, the step is left out instead.

A gradient beyond 2^63 counts as not finite: its square would overflow in fp32, and an infinite v makes a block's
updates zero ever after.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fp8.optim.shards import true_everywhere

LARGEST_GRADIENT = 2.0**63
_FREE_TO_READ = ("cpu",)  # devices whose memory the host reads without waiting


class SkippedSteps:
    """Judges the steps of an optimizer, and counts those that are skipped.

    Args:
        owner: Whose steps, for its errors.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._counts: Tensor | None = None

    def finite(self, params: Sequence[Tensor], grads: Sequence[Tensor], limit: int | None) -> Tensor:
        """Whether a step is to be taken, the same on every process: a bool scalar where the first gradient is.

        Args:
            params: Those that are stepped, one or more.
            grads: What this process holds of their gradients.
            limit: So many skipped steps in a row are an error; looking for it reads the device.

        Raises:
            FloatingPointError: The limit is reached.
        """
        finite = true_everywhere(all_finite(grads), params)
        if self._counts is None:
            self._counts = torch.zeros(2, dtype=torch.int64, device=finite.device)
        self._counts.copy_(count_skips(self._counts, finite.to(self._counts.device)))  # in place, for a GPU graph
        if limit is not None and int(self._counts[1]) >= limit:
            raise FloatingPointError(
                f"{self._owner}: the gradients of {limit} steps in a row held NaN, inf or a number beyond 2^63. Lower "
                "the learning rate, clip gradients, or resume from an earlier checkpoint."
            )
        return finite

    @property
    def counts(self) -> Tensor | None:
        """Steps skipped in all, and since the last one that was not: int64 [2], on the device; None before any."""
        return self._counts

    @property
    def total(self) -> int:
        """How many there were; reads the device."""
        return 0 if self._counts is None else int(self._counts[0])


class Arriving:
    """A bool scalar on its way to the host, which need not wait for it now."""

    def __init__(self, flag: Tensor) -> None:
        self._copy = flag.to("cpu", non_blocking=True, copy=True)
        self._event = None if flag.device.type == "cpu" else torch.Event(flag.device)
        if self._event is not None:
            self._event.record()

    def value(self) -> bool:
        """The flag; waits for what was queued before it, and for nothing that was queued since."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._copy)


def free_to_read(flag: Tensor) -> bool:
    """Whether the host may look at `flag` without waiting for a device."""
    return flag.device.type in _FREE_TO_READ


def all_finite(grads: Sequence[Tensor]) -> Tensor:
    """Whether no element of any gradient is NaN, infinite or beyond 2^63: a bool scalar on the first one's device."""
    extremes: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        if grad.numel():
            extremes.setdefault((grad.device, grad.dtype), []).extend(torch.aminmax(grad))  # both are NaN if any is
    device = grads[0].device
    flags = [(torch.stack(values).abs() <= LARGEST_GRADIENT).all().to(device) for values in extremes.values()]
    return torch.stack(flags).all() if flags else torch.ones((), dtype=torch.bool, device=device)


def count_skips(counts: Tensor, finite: Tensor) -> Tensor:
    """The number of skipped steps in all and the number since the last step that was not, int64 [2].

    Args:
        counts: The same after the last step.
        finite: Whether this step is taken, a bool scalar.
    """
    skipped = (~finite).long()
    return torch.stack([counts[0] + skipped, (counts[1] + 1) * skipped])


def keep_unless(finite: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """`new` where the step is taken, else `old`; None is a step that is known to be taken."""
    return new if finite is None else torch.where(finite, new, old)
