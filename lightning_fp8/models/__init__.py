"""The decoder, its LightningModule, sampling and accounting."""

from lightning_fp8.models.config import DecoderConfig
from lightning_fp8.models.decoder import Decoder
from lightning_fp8.models.generate import generate, generate_batch
from lightning_fp8.models.lit import DecoderLM
from lightning_fp8.models.sampling import Sampling

__all__ = ["Decoder", "DecoderConfig", "DecoderLM", "Sampling", "generate", "generate_batch"]
