"""The keys and values of the tokens that a decoder has read, so that each new token costs one position.

A cache has a fixed capacity, so generation takes constant memory however long it goes on. When it is full, a new token
takes the place of the oldest one, the first `sinks` tokens excepted: these draw most of the attention whatever they
say, and a model that loses sight of them breaks down (Xiao et al., StreamingLLM). Positions are then counted within
the cache, not within the text, so that no distance exceeds the capacity: the sinks stand right before the oldest
token that is left. Keys are therefore stored before their rotation and rotated when read, which reads the cache no
more often than attention itself does.

Rows of a batch may have read different numbers of tokens: each has its own slots.

Suffixes of tensor names:  b batch, t new token, c slot, k key/value head, s head width.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_fp8.models.config import DecoderConfig


class Store(Protocol):
    """Where the keys, or the values, of one layer are kept."""

    def write(self, slot_bt: Tensor, x_bkts: Tensor) -> None:
        """Puts token t of row b into slot `slot_bt[b, t]`."""

    def read(self, slots: int) -> Tensor:
        """The first `slots` slots, [B, K, C, S], in the dtype that was written."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""


class PlainStore:
    """Keeps what it is given, in its own dtype."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self._x_bcks = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, slot_bt: Tensor, x_bkts: Tensor) -> None:
        """Puts token t of row b into slot `slot_bt[b, t]`."""
        write_slots(self._x_bcks, slot_bt, x_bkts.transpose(1, 2))

    def read(self, slots: int) -> Tensor:
        """The first `slots` slots, [B, K, C, S]."""
        return self._x_bcks[:, :slots].transpose(1, 2)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._x_bcks.nbytes


def write_slots(store_bc: Tensor, slot_bt: Tensor, x_bt: Tensor) -> None:
    """`store_bc[b, slot_bt[b, t]] = x_bt[b, t]`, for all b and t; further dimensions go along."""
    store_bc[torch.arange(len(slot_bt), device=slot_bt.device)[:, None], slot_bt] = x_bt.to(store_bc.dtype)


MakeStore = Callable[[tuple[int, int, int, int], torch.dtype, torch.device], Store]


class Placement(NamedTuple):
    """Where new tokens stand among those in the cache: positions within the cache, and what a new token may see."""

    query_bt: Tensor
    key_bc: Tensor
    seen_btc: Tensor


class KVCache:
    """The keys and values of all layers of a decoder; pass it to `Decoder` together with the new tokens.

    For inference: what is stored is cut off from the graph.

    Args:
        config: The decoder's.
        batch: Rows B.
        capacity: Slots C of each row.
        sinks: First tokens of a text that are never dropped.
        dtype: Of the decoder's activations.
        device: Of the cache.
        store: Makes the store [B, C, K, S] of one layer's keys or values.

    Raises:
        ValueError: There would be no slot besides the sinks'.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch: int,
        capacity: int,
        *,
        sinks: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        store: MakeStore = PlainStore,
    ) -> None:
        if not 0 <= sinks < capacity:
            raise ValueError(f"KVCache: {sinks} sinks leave no slot of {capacity} for other tokens; lower sinks.")
        shape = (batch, capacity, config.num_kv_heads, config.head_size)
        device = torch.device(device)
        self.capacity, self.sinks = capacity, sinks
        self._keys = [store(shape, dtype, device) for _ in range(config.num_layers)]
        self._values = [store(shape, dtype, device) for _ in range(config.num_layers)]
        self._read_b = torch.zeros(batch, dtype=torch.int64, device=device)  # tokens read so far
        self._held_bc = torch.full((batch, capacity), -1, device=device)  # which token of the text; -1: none
        self._used = 0  # slots that may hold a token, known without asking the device
        self._slot_bt = self._held_bc[:, :0]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(store.nbytes for store in [*self._keys, *self._values])

    def place(self, length: int, lengths_b: Tensor | None = None) -> Placement:
        """Makes room for `length` new tokens a row; each layer's `update` then fills it.

        Args:
            length: T, new tokens a row.
            lengths_b: How many of them are tokens, the rest being padding on the right; None is all.

        Raises:
            ValueError: Several tokens at once do not fit.
        """
        if length > 1 and self._used + length > self.capacity:
            raise ValueError(
                f"KVCache: {length} tokens after {self._used} do not fit into {self.capacity} slots; raise capacity, or"
                " give one token at a time."
            )
        text_bt = self._read_b[:, None] + torch.arange(length, device=self._read_b.device)
        ring = self.sinks + (text_bt - self.sinks) % (self.capacity - self.sinks)
        self._slot_bt = torch.where(text_bt < self.capacity, text_bt, ring)
        # Padding takes slots too, at positions that no token sees before a token takes the slot over.
        write_slots(self._held_bc, self._slot_bt, text_bt)
        self._read_b = self._read_b + (length if lengths_b is None else lengths_b)
        self._used = min(self.capacity, self._used + length)
        held_bc = self._held_bc[:, : self._used]
        dropped_b = (self._read_b - self.capacity).clamp(min=0)[:, None]
        return Placement(
            query_bt=text_bt - dropped_b,
            key_bc=torch.where(held_bc < self.sinks, held_bc, held_bc - dropped_b),
            seen_btc=(held_bc >= 0)[:, None] & (held_bc[:, None] <= text_bt[..., None]),
        )

    def update(self, layer: int, k_bkts: Tensor, v_bkts: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new keys, not yet rotated, and values of `layer`; returns all of its, [B, K, C, S]."""
        for store, new in ((self._keys[layer], k_bkts), (self._values[layer], v_bkts)):
            store.write(self._slot_bt, new.detach())
        return self._keys[layer].read(self._used), self._values[layer].read(self._used)
