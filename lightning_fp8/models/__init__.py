"""The decoder, its LightningModule, sampling and accounting."""

from lightning_fp8.models.config import DecoderConfig
from lightning_fp8.models.decoder import Decoder
from lightning_fp8.models.generate import generate
from lightning_fp8.models.lit import DecoderLM

__all__ = ["Decoder", "DecoderConfig", "DecoderLM", "generate"]
