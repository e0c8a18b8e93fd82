"""What a weight is between two steps: the five roundings of bf16 weights, and fp32's none.

An optimizer computes a new weight in fp32; what it may keep is less. Each class is one answer: the tensors that it
keeps, the weight that they stand for (`decode`), and how a new one is put into them (`encode`). The first field is
always what the model sees; the others are state of the optimizer and start at zero.

| rounding      | bytes | the weight that steps build on          | a small update                                 |
|---------------|-------|-----------------------------------------|------------------------------------------------|
| "stochastic"  | 2     | the bf16 value, 8 bits of precision     | moves it by one last bit, at the right odds    |
| "nearest"     | 2     | the bf16 value                          | is lost below half of its last bit, 2^-9       |
| "kahan"       | 4     | that plus a bf16 compensation, 16 bits  | is lost below about 2^-17                      |
| "correction8" | 3     | that plus 8 more bits, 16 bits          | moves the 16th bit at the right odds           |
| "scaled_fp16" | 4     | an fp16 master copy with a scale, 11    | is lost below half of its last bit, 2^-12      |

With "stochastic" the model sees the noise of its roundings, half a last bit a weight that moves; with "kahan" and
"correction8" it sees the nearest bf16 value to a more precise weight. Both make the same of a plain bf16 weight when
they start: their state is zero. Whoever writes a weight in between should zero its compensation too, though what it
can add is half a last bit at most.

"scaled_fp16" is here to compare with: FP8-LM's master weights (`moments_fp8lm.py`) and those of Hugging Face's
nanotron. Theirs replaces every other copy, 2 bytes, because their layers multiply an FP8 copy of it, 1 byte. Ours
keeps the model as it is, in bf16, which any layer can compute with, so it costs 4. It serves parameters whose moments
have scales; others have "kahan".
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fp8.numerics.formats import e8m0_ceil, e8m0_value
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


class ScaledFP16Weights(NamedTuple):
    """bf16 weights, and a master copy in fp16 that a power of two a block brings into fp16's range.

    The weight is the nearest bf16 number to the master. Where it is not, the master does not count: before the first
    step, after somebody wrote the weight, and where a weight is so far below the largest of its block, 2^29, that fp16
    would make a subnormal number of it.
    """

    weight: Tensor
    master: Tensor
    master_scale: Tensor

    @classmethod
    def encode(cls, exact: Tensor, bits: Tensor) -> "ScaledFP16Weights":
        """Rounds `exact`, fp32 [n, b], to nearest; `bits` are not used."""
        scale = e8m0_ceil(exact.abs().amax(dim=1, keepdim=True) * 2.0**-_FP16_OCTAVES)
        master = (exact / e8m0_value(scale)).to(torch.float16)
        kept = master.float() * e8m0_value(scale)
        precise = (kept - exact).abs() <= exact.abs() * 2.0**-11
        return cls(torch.where(precise, kept, exact).to(torch.bfloat16), master, scale)

    def decode(self) -> Tensor:
        """The weight, fp32 [n, b]."""
        master = self.master.float() * e8m0_value(self.master_scale)
        # By their bits: -0 is not 0, and the master of a new weight is 0.
        counts = master.to(torch.bfloat16).view(torch.int16) == self.weight.view(torch.int16)
        return torch.where(counts, master, self.weight.float())


_FP16_OCTAVES = 15  # the largest weight of a block is brought to at most 2^15, half of what fp16 holds
Weights = FP32Weights | StochasticWeights | NearestWeights | KahanWeights | CorrectedWeights | ScaledFP16Weights
BF16_WEIGHTS: dict[str, type[Weights]] = {
    "stochastic": StochasticWeights,
    "nearest": NearestWeights,
    "kahan": KahanWeights,
    "correction8": CorrectedWeights,
    "scaled_fp16": ScaledFP16Weights,
}
STATE_DTYPES = {
    "compensation": torch.bfloat16,
    "correction": torch.int8,
    "master": torch.float16,
    "master_scale": torch.uint8,
}
"""What the classes keep beside the weight."""
PER_BLOCK = ("master_scale",)
"""Which of it has one number a block; the rest has one an element."""
