"""Batches from a position in the stream of blocks, with a resume that is exact to the batch.

Worker w of n makes the batches w, w + n, ... and torch collects them in that order, so the batches are the same with
any number of workers. The state is one number, the blocks that the run has consumed, and what it is a position in:
the content of the prepared sets (their fingerprints, not their paths), weights, seed and sequence length. Checkpoints
refuse others; batch size, workers and processes may change.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_fp8.data.folder import TokenBlocks


class Order(Protocol):
    """Which block is where."""

    def __len__(self) -> int:
        """Positions in an epoch."""

    def at(self, position: int) -> tuple[int, int, int]:
        """The set, the chunk and the block at a position."""


class TokenBatches(IterableDataset[torch.Tensor]):
    """Batches [B, T + 1] of this process, from `start` on.

    Args:
        sets: Where the blocks are.
        order: Which is where.
        batch_size: B.
        rank: Of this process.
        world_size: Processes; batch i takes the positions from `start + i * B * world_size` on, B for each.
        drop_last: Whether to leave out the batches that would be smaller.

    Attributes:
        start: Position of the first block.
        stop: Position after the last.
    """

    def __init__(
        self,
        sets: Sequence[TokenBlocks],
        order: Order,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        drop_last: bool,
    ) -> None:
        self.sets = sets
        self.order = order
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.start, self.stop = 0, len(order)

    @property
    def step(self) -> int:
        """Positions that a batch of all processes takes."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        # Uneven shares would block collectives: what is over when all processes have as many is left out.
        blocks = (self.stop - self.start) // self.world_size
        return blocks // self.batch_size if self.drop_last else -(-blocks // self.batch_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        for batch in range(first, len(self), every):
            start = self.start + batch * self.step
            share = min(self.batch_size, (self.stop - start) // self.world_size)
            positions = range(start + self.rank * share, start + (self.rank + 1) * share)
            yield torch.stack([self._read(*self.order.at(position)) for position in positions])

    def _read(self, which: int, chunk: int, block: int) -> torch.Tensor:
        return self.sets[which].read(chunk, block)


class TokenLoader(DataLoader[torch.Tensor]):
    """A loader for which each `iter()` is an epoch that goes on where the batches taken so far end.

    The first epoch after a resume is the rest of the one that was interrupted.

    Args:
        batches: What to load; the loader moves its `start` and `stop`.
        num_workers: Loader processes; 0 loads in the training process.
        identity: What a position is a position in; kept in the state.
        accumulate: Batches of an optimizer step: an epoch ends with a whole one, so that all steps are of as many
            tokens, on any number of processes.
    """

    def __init__(
        self,
        batches: TokenBatches,
        num_workers: int,
        identity: Mapping[str, Any] | None = None,
        accumulate: int = 1,
    ) -> None:
        # torch draws a seed for the workers at each `iter()`: not from the random numbers that training goes on with.
        super().__init__(batches, batch_size=None, num_workers=num_workers, generator=torch.Generator())
        self._batches = batches
        self._identity = dict(identity or {})
        self._accumulate = accumulate
        self._position = 0
        self._epoch_done = 0
        self._is_resumed = False

    def __len__(self) -> int:
        blocks = len(self._batches.order)
        per_process, size = blocks // self._batches.world_size, self._batches.batch_size
        count = per_process // size if self._batches.drop_last else -(-per_process // size)
        return count - count % self._accumulate if count >= self._accumulate else count

    def __iter__(self) -> Any:  # an Iterator[Tensor]; torch names a class of its own
        if not self._is_resumed:
            self._epoch_done = 0
        blocks = len(self._batches.order)
        if self._batches.drop_last:
            blocks = len(self) * self._batches.step
        self._batches.start, self._batches.stop = self._position, self._position + blocks - self._epoch_done
        for batch in super().__iter__():
            self._is_resumed = False  # an iterator that was made and not used, as Lightning does, does not count
            self._position += self._batches.step
            self._epoch_done += self._batches.step
            yield batch

    def leave_out(self, batches: int) -> None:
        """Moves on in the stream, which has no end: the epoch stays as long. The next `iter()` goes on from there."""
        self.load_state_dict({**self.state_dict(), "position": self._position + batches * self._batches.step})

    def state_dict(self) -> dict[str, Any]:
        """The position, that in the epoch, and what they are positions in."""
        return {"position": self._position, "epoch_done": self._epoch_done, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state of a loader of the same data, wherever the folders are now.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: The state belongs to other data or another order.
        """
        for name, value in self._identity.items():
            if name not in state or state[name] != value:
                raise ValueError(
                    f"The checkpoint's position is one in other data: {name} was {state.get(name, 'not known')} and is "
                    f"now {value}. Set it as it was (the same sources and parameters of `prepare`, for a fingerprint), "
                    "or start a new run."
                )
        self._position = state["position"]
        self._epoch_done = state["epoch_done"]
        if self.batches_done >= len(self):  # the next epoch begins
            self._epoch_done = 0
        self._is_resumed = True

    @property
    def batches_done(self) -> int:
        """Batches of the epoch so far, in those of this loader, whatever the size of those that were loaded."""
        return self._epoch_done // self._batches.step
