"""Keys and values of a cache in FP8: one byte an element and a scale for each token and head."""

import torch
from torch import Tensor

from lightning_fp8.models.cache import write_slots
from lightning_fp8.numerics.formats import E4M3
from lightning_fp8.numerics.quantize import amax, quantize_to, scale_of


class FP8Store:
    """Casts what it is given to E4M3, each head of each token filling the format's range.

    Takes 1 + 4 / S bytes an element for heads of width S, where bf16 takes 2. Keys come before their rotation, which
    leaves their channels apart, and a scale a token lets no outlier of one token blur another.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self._codes_bcks = torch.zeros(shape, dtype=E4M3.dtype, device=device)
        self._scale_bck1 = torch.ones(*shape[:-1], 1, device=device)
        self._dtype = dtype

    def write(self, slot_bt: Tensor, x_bkts: Tensor) -> None:
        """Puts token t of row b into slot `slot_bt[b, t]`."""
        x_btks = x_bkts.transpose(1, 2)
        scale = scale_of(amax(x_btks, along=-1), E4M3)
        write_slots(self._codes_bcks.view(torch.uint8), slot_bt, quantize_to(x_btks, E4M3, scale).view(torch.uint8))
        write_slots(self._scale_bck1, slot_bt, scale)

    def read(self, slots: int) -> Tensor:
        """The first `slots` slots, [B, K, C, S]."""
        x_bcks = self._codes_bcks[:, :slots].float() * self._scale_bck1[:, :slots]
        return x_bcks.to(self._dtype).transpose(1, 2)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._codes_bcks.nbytes + self._scale_bck1.nbytes
