import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lightning_fp8.models import Decoder, DecoderConfig
from lightning_fp8.models.accounting import FlopCounter


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
