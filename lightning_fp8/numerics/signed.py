"""An FP8 codec for a signed state that stands alone: the momentum of SGD, Muon or RMSprop.

Where there is a second moment, the first is stored in units of it (`moments.py`). Without one, a block is stored
relative to its own largest magnitude and companded by an exponent that fits its spread, so that small elements of an
uneven block keep their bits and those of an even one are not given range that they do not need. Per block of b
elements m, with hi = max|m| (kept exactly) and D = the mean of log2(hi / |m|) over the non-zeros,

    k = clamp(6 / D, 1, 3), down to a multiple of 1/16,      code = E4M3(sign(m) * 448 * (|m| / hi)^k).

E4M3 rounds a value to one part in 2^4 or better, so |m| to 2^-4 / k of itself: 2.1 % at worst where k = 3. Below the
grid of E4M3's subnormals errors are up to hi * (2^-10 / 448)^(1/k), 0.2 % of hi at k = 3. One byte an element, 4 + 1
bytes a block: 1.04 bytes an element at b = 128. Rounds to nearest. It fails where a block's columns differ by more than
E4M3's 18 octaves, whose small ones become 0: that loses their momentum, not their next gradient.

Values below 2^-126 count as 0 on every device. Transcendental functions are taken in fp64 and rounded once, as in
`moments.py`.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fp8.numerics.formats import E4M3

_TINY = torch.finfo(torch.float32).tiny  # 2^-126
_STEPS = 16  # of the exponent, a unit


class Signed(NamedTuple):
    """n blocks of b signed elements.

    Attributes:
        codes: uint8 [n, b], the bits of E4M3 values.
        hi: fp32 [n, 1], the block's largest magnitude, exact.
        power: uint8 [n, 1], 16 k, in 16..48.
    """

    codes: Tensor
    hi: Tensor
    power: Tensor

    @classmethod
    def encode(cls, m: Tensor) -> "Signed":
        """Encodes finite `m`, fp32 [n, b]."""
        size = m.abs()
        live = size >= _TINY
        hi = torch.where(live, size, 0.0).amax(dim=1, keepdim=True)
        octaves = torch.where(live, hi.clamp_min(_TINY).double().log2() - size.clamp_min(_TINY).double().log2(), 0.0)
        mean = octaves.sum(dim=1, keepdim=True) / live.sum(dim=1, keepdim=True).clamp_min(1)
        power = (6 * _STEPS / mean.clamp_min(1.0)).clamp(_STEPS, 3 * _STEPS).floor()
        values = torch.where(live, (octaves * (-power / _STEPS)).exp2() * E4M3.max, 0.0).float().copysign(m)
        return cls(values.to(E4M3.dtype).view(torch.uint8), hi, power.to(torch.uint8))

    def decode(self) -> Tensor:
        """The elements, fp32 [n, b]; one whose code is 448 is exactly `hi` or -`hi`."""
        logs, signs = _levels(self.codes.device)
        index = self.codes.reshape(-1).int()
        octaves = logs.index_select(0, index).view(self.codes.shape) * (_STEPS / self.power.double())
        size = (octaves.exp2() * self.hi.double()).float()
        return size * signs.index_select(0, index).view(self.codes.shape)


@functools.cache
def _levels(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each of the 256 codes, log2 of its magnitude over 448, fp64, and its sign, fp32."""
    values = torch.arange(256, dtype=torch.uint8).view(E4M3.dtype).double()
    return (values.abs() / E4M3.max).log2().to(device), torch.ones(256).copysign(values.float()).to(device)
