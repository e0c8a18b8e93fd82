"""What a weight is between two steps: the four roundings of bf16 weights, and fp32's none.

An optimizer computes a new weight in fp32; what it may keep is less. Each class is one answer: the tensors that it
keeps, the weight that they stand for (`decode`), and how a new one is put into them (`encode`). The first field is
always what the model sees; the others are state of the optimizer and start at zero.

| rounding      | bytes | the weight that steps build on          | a small update                                 |
|---------------|-------|-----------------------------------------|------------------------------------------------|
| "stochastic"  | 2     | the bf16 value, 8 bits of precision     | moves it by one last bit, at the right odds    |
| "nearest"     | 2     | the bf16 value                          | is lost below half of its last bit, 2^-9       |
| "kahan"       | 4     | that plus a bf16 compensation, 16 bits  | is lost below about 2^-17                      |
| "correction8" | 3     | that plus 8 more bits, 16 bits          | moves the 16th bit at the right odds           |

With "stochastic" the model sees the noise of its roundings, half a last bit a weight that moves; with "kahan" and
"correction8" it sees the nearest bf16 value to a more precise weight. Both make the same of a plain bf16 weight when
they start: their state is zero. Whoever writes a weight in between should zero its compensation too, though what it
can add is half a last bit at most.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fp8.numerics.rounding import stochastic_round_bf16


class FP32Weights(NamedTuple):
    """fp32 weights: nothing is rounded."""

    weight: Tensor

    @classmethod
    def encode(cls, exact: Tensor, bits: Tensor) -> "FP32Weights":
        """Keeps `exact`, fp32, as it is; `bits` are not used."""
        return cls(exact)

    def decode(self) -> Tensor:
        """The weight, fp32."""
        return self.weight


class StochasticWeights(NamedTuple):
    """bf16 weights, rounded up or down with odds proportional to the distance."""

    weight: Tensor

    @classmethod
    def encode(cls, exact: Tensor, bits: Tensor) -> "StochasticWeights":
        """Rounds `exact`, fp32, by the low 16 of the random `bits`, int32 of its shape."""
        return cls(stochastic_round_bf16(exact, bits))

    def decode(self) -> Tensor:
        """The weight, fp32."""
        return self.weight.float()


class NearestWeights(NamedTuple):
    """bf16 weights, rounded to nearest."""

    weight: Tensor

    @classmethod
    def encode(cls, exact: Tensor, bits: Tensor) -> "NearestWeights":
        """Rounds `exact`, fp32; `bits` are not used."""
        return cls(exact.to(torch.bfloat16))

    def decode(self) -> Tensor:
        """The weight, fp32."""
        return self.weight.float()


class KahanWeights(NamedTuple):
    """bf16 weights, and in bf16 too what rounding them to nearest has left out (Kahan summation)."""

    weight: Tensor
    compensation: Tensor

    @classmethod
    def encode(cls, exact: Tensor, bits: Tensor) -> "KahanWeights":
        """Splits `exact`, fp32, into two bf16 numbers; `bits` are not used."""
        weight = exact.to(torch.bfloat16)
        rest = exact - weight.float()
        return cls(weight, torch.where(weight.isfinite(), rest, 0.0).to(torch.bfloat16))

    def decode(self) -> Tensor:
        """The weight, fp32: the sum of the two."""
        weight, compensation = self.weight.float(), self.compensation.float()
        return torch.where(compensation == 0, weight, weight + compensation)  # -0 + 0 would be 0


class CorrectedWeights(NamedTuple):
    """24-bit weights: fp32 without its last 8 bits, in a bf16 weight and an int8 correction.

    The correction counts 256ths of the weight's last bit, -128 to 127, so that `weight` is the nearest bf16 number to
    their sum, ties away from zero. The last 8 bits are rounded stochastically.
    """

    weight: Tensor
    correction: Tensor

    @classmethod
    def encode(cls, exact: Tensor, bits: Tensor) -> "CorrectedWeights":
        """Rounds `exact`, fp32, by the low 8 of the random `bits`, int32 of its shape, and splits it."""
        # Sign and magnitude are separate in the encoding, so integer addition works on the magnitude.
        kept = (exact.view(torch.int32) + (bits & 0xFF)) & ~0xFF
        upper = (kept + 0x8000) & ~0xFFFF
        finite = exact.isfinite()
        weight = torch.where(finite, upper.view(torch.float32), exact).to(torch.bfloat16)
        return cls(weight, (((kept - upper) >> 8) * finite).to(torch.int8))

    def decode(self) -> Tensor:
        """The weight, fp32."""
        return (self.weight.float().view(torch.int32) + (self.correction.int() << 8)).view(torch.float32)


Weights = FP32Weights | StochasticWeights | NearestWeights | KahanWeights | CorrectedWeights
BF16_WEIGHTS: dict[str, type[Weights]] = {
    "stochastic": StochasticWeights,
    "nearest": NearestWeights,
    "kahan": KahanWeights,
    "correction8": CorrectedWeights,
}
STATE_DTYPES = {"compensation": torch.bfloat16, "correction": torch.int8}
"""What the classes keep beside the weight."""
