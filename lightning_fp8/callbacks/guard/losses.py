"""Losses that wait on the device until the host reads them, all at once.

A step adds a reference to a tensor that exists: no operation, no wait. A read is a `stack`, where there are several
processes an all-gather of as many numbers, and one wait of the host for all of it. The numbers of all processes are
then added in the order of their ranks, so that all come to the same mean, to the last bit, and to the same decisions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class WaitingLosses:
    """The losses of steps that were not read yet, and those that were read and not used yet."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets all."""
        self._parts: list[Tensor] = []  # of micro-batches
        self._ends: list[int] = []  # of steps, in `_parts`
        self._read: list[float] = []

    def add(self, loss: Tensor, *, ends_step: bool) -> None:
        """Takes the loss of a micro-batch, a scalar; those of a step are added up."""
        self._parts.append(loss.detach())
        if ends_step:
            self._ends.append(len(self._parts))

    def read(self, *others: Tensor) -> list[float]:
        """Reads what waits, and `others`, scalars of this process, in the same wait; returns the others."""
        done = self._ends[-1] if self._ends else 0
        if not done:
            return [float(other) for other in others]
        rows = _on_all_ranks([*self._parts[:done], *others])
        starts = [0, *self._ends[:-1]]
        for start, end in zip(starts, self._ends, strict=True):
            self._read.append(sum(sum(row[start:end]) for row in rows) / len(rows))
        self._parts, self._ends = self._parts[done:], []
        rank = torch.distributed.get_rank() if _several() else 0
        return rows[rank][done:]

    def take(self) -> list[float]:
        """The mean losses of the steps that were read, which are then forgotten."""
        taken, self._read = self._read, []
        return taken

    def state_dict(self) -> list[float]:
        """The losses of all steps that were not used yet; reads them, on all ranks."""
        self.read()
        return list(self._read)

    def load_state_dict(self, state: Sequence[float]) -> None:
        """Takes over what `state_dict` returned."""
        self.clear()
        self._read = list(state)


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _on_all_ranks(scalars: Sequence[Tensor]) -> list[list[float]]:
    """The numbers of each rank, in the order of ranks."""
    device = scalars[0].device
    own = torch.stack([scalar.to(device, torch.float32) for scalar in scalars])
    if not _several():
        return [own.tolist()]
    rows = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(rows, own)
    everything: list[list[float]] = torch.stack(rows).tolist()
    return everything
