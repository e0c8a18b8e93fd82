from typing import Any

import pytest
import torch
from lightning.fabric.utilities.throughput import measure_flops
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lightning_fp8.models import Decoder, DecoderConfig, DecoderLM
from lightning_fp8.models.accounting import FlopCounter, flops_per_token


def test_flop_counter_counts_what_torch_counts() -> None:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(vocab_size=64, hidden_size=64, num_layers=2, intermediate_size=96))
    tokens, counts = torch.randint(64, (2, 16)), []
    for counter in (FlopCounter(), FlopCounterMode(display=False)):
        with counter:
            decoder(tokens).sum().backward()
        counts.append(counter.flops if isinstance(counter, FlopCounter) else counter.get_total_flops())
    linear = 3 * 2 * tokens.numel() * (2 * (4 * 64 * 64 + 3 * 64 * 96) + 64 * 64)
    # q k^T and its product with v; backward has five such products, because it computes q k^T again
    attention = 2 * 2 * (2 + 5) * 2 * 16 * 16 * 64
    assert counts[0] == linear + attention
    known = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu in flop_registry  # not so in torch 2.11
    assert counts[1] == linear + known * attention


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_kv_heads": 1}, {"num_layers": 1, "qk_norm": False}, {"tied_embeddings": True}],
    ids=str,
)
@pytest.mark.parametrize("length", [8, 48])
def test_analytic_flops_are_those_that_lightning_measures(changes: dict[str, Any], length: int) -> None:
    shape: dict[str, Any] = {"vocab_size": 80, "hidden_size": 64, "num_layers": 3, "intermediate_size": 96}
    config = DecoderConfig(**{**shape, "num_heads": 2, "num_kv_heads": 2, **changes})
    with torch.device("meta"):
        decoder, tokens = Decoder(config), torch.zeros(2, length, dtype=torch.int64)
    measured = measure_flops(decoder, lambda: decoder(tokens), lambda logits: logits.sum())
    assert flops_per_token(config, length) * 2 * length == measured
    assert DecoderLM(config).flops_per_token(length) == flops_per_token(config, length)
