"""A random decoder's checkpoint, which the tests of the exchange begin with."""

from dataclasses import asdict
from pathlib import Path

import torch

from lightning_fp8.models import Decoder, DecoderConfig

SHAPE = DecoderConfig(
    vocab_size=272, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=96, context_length=64
)


def save(config: DecoderConfig, path: Path, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    """A run's folder with a random decoder in it."""
    torch.manual_seed(0)
    decoder = Decoder(config)
    for p in decoder.parameters():
        p.data = torch.randn_like(p) * (0.3 if p.dim() < 2 else 1.2 / p.shape[1] ** 0.5)
    decoder.to(dtype)
    path.parent.mkdir(parents=True)
    state = {f"decoder.{name}": weight for name, weight in decoder.state_dict().items()}
    torch.save({"decoder_config": asdict(config), "state_dict": state}, path)
    return decoder
