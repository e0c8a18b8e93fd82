"""torchmetrics of language modelling."""

from lightning_fp8.metrics.perplexity import BitsPerByte, Perplexity

__all__ = ["BitsPerByte", "Perplexity"]
