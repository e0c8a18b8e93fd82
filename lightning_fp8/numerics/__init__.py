"""What a number is: formats, casts, rounding and the codecs of the optimizer's moments."""

from lightning_fp8.numerics.formats import E4M3, E5M2, FORMATS, Format
from lightning_fp8.numerics.quantize import Quantized, dequantize, quantize
from lightning_fp8.numerics.rounding import random_bits, stochastic_round_bf16

__all__ = [
    "E4M3",
    "E5M2",
    "FORMATS",
    "Format",
    "Quantized",
    "dequantize",
    "quantize",
    "random_bits",
    "stochastic_round_bf16",
]
