"""Which block is at which position of an endless training stream: a function of the seed and the position alone.

Neither the number of loader workers nor of processes nor the batch size enters, so a run can be resumed with others
and goes on with the very next block. One pass over a set visits its chunks in a random order, and the blocks of
`WINDOW_CHUNKS` chunks at a time in a random order among them: far enough to part neighbours, near enough that chunks
behind a URL are fetched once a pass. A mixture takes from its sets in cycles of `CYCLE` positions, in each of which
every set has exactly its share, in a random order; each set goes through pass after pass at its own pace.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

WINDOW_CHUNKS = 16
CYCLE = 1 << 14

_PASS, _WINDOW, _MIX = range(3)


class ShuffledBlocks:
    """The blocks of one set, pass after pass.

    Args:
        chunk_sizes: Blocks in each chunk.
        seed: Of the order.
    """

    def __init__(self, chunk_sizes: Sequence[int], seed: int) -> None:
        self._sizes = np.array(chunk_sizes, np.int64)
        self._seed = seed
        self._length = int(self._sizes.sum())

    def __len__(self) -> int:
        return self._length

    def at(self, draw: int) -> tuple[int, int]:
        """The chunk and the block in it that are drawn as number `draw`, from 0 on without end."""
        number, index = divmod(draw, self._length)
        starts = _windows(self, number)[1]
        window = int(np.searchsorted(starts, index, side="right")) - 1
        chunk, block = _shuffled(self, number, window)[index - int(starts[window])]
        return int(chunk), int(block)

    def windows(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The order of the chunks in pass `number`, and the draw of the pass at which each window starts."""
        chunks = _permutation(len(self._sizes), self._seed, _PASS, number)
        ends = np.cumsum(self._sizes[chunks])
        starts = np.concatenate([[0], ends[WINDOW_CHUNKS - 1 :: WINDOW_CHUNKS]])
        return chunks, starts[starts < self._length]

    def shuffled(self, number: int, window: int) -> NDArray[np.int64]:
        """The pairs of chunk and block [blocks, 2] of a window, in order."""
        chunks = self.windows(number)[0][window * WINDOW_CHUNKS : (window + 1) * WINDOW_CHUNKS]
        pairs = np.concatenate([np.stack([np.full(n, c), np.arange(n)], 1) for c in chunks for n in [self._sizes[c]]])
        order = _permutation(len(pairs), self._seed, _WINDOW, number, window)
        result: NDArray[np.int64] = pairs[order]
        return result


class Mixture:
    """Several sets in one stream.

    Args:
        sets: The sets.
        weights: How often to draw from each, in any unit.
        seed: Of the order.
    """

    def __init__(self, sets: Sequence[ShuffledBlocks], weights: Sequence[float], seed: int) -> None:
        self._sets = list(sets)
        self._seed = seed
        exact = CYCLE * np.array(weights) / sum(weights)
        self.shares = np.maximum(1, np.floor(exact)).astype(np.int64)
        # Largest remainders first, so that the shares add up to the cycle.
        for index in np.argsort(-(exact - self.shares), kind="stable")[: max(0, CYCLE - int(self.shares.sum()))]:
            self.shares[index] += 1
        self.shares[np.argmax(self.shares)] += CYCLE - self.shares.sum()

    def __len__(self) -> int:
        """As many positions as the sets have blocks: an epoch, by convention."""
        return sum(map(len, self._sets))

    def at(self, position: int) -> tuple[int, int, int]:
        """The set, the chunk and the block at a position, from 0 on without end."""
        if len(self._sets) == 1:
            return 0, *self._sets[0].at(position)
        cycle, offset = divmod(position, CYCLE)
        chosen, ranks = _cycle(self, cycle)
        which = int(chosen[offset])
        return which, *self._sets[which].at(cycle * int(self.shares[which]) + int(ranks[offset]))

    def cycle(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The set at each position of a cycle [CYCLE], and how many earlier ones have the same set [CYCLE]."""
        chosen = np.repeat(np.arange(len(self._sets)), self.shares)[_permutation(CYCLE, self._seed, _MIX, number)]
        ranks = np.empty_like(chosen)
        for index in range(len(self._sets)):
            here = chosen == index
            ranks[here] = np.arange(int(here.sum()))
        return chosen, ranks


class InOrder:
    """Every block of one set, once and in order.

    Args:
        chunk_sizes: Blocks in each chunk.
    """

    def __init__(self, chunk_sizes: Sequence[int]) -> None:
        self._ends = np.cumsum(np.array(chunk_sizes, np.int64))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def at(self, position: int) -> tuple[int, int, int]:
        """The set, which is 0, the chunk and the block at a position."""
        chunk = int(np.searchsorted(self._ends, position, side="right"))
        return 0, chunk, position - (int(self._ends[chunk - 1]) if chunk else 0)


def _permutation(length: int, seed: int, *path: int) -> NDArray[np.int64]:
    # RandomState and not Generator: its streams are promised to stay as they are in all releases of NumPy.
    return np.random.RandomState([seed % 2**32, *path]).permutation(length)


# Positions come nearly in order, so the current table of each set is all that is needed.
_windows = lru_cache(64)(ShuffledBlocks.windows)
_shuffled = lru_cache(64)(ShuffledBlocks.shuffled)
_cycle = lru_cache(4)(Mixture.cycle)
