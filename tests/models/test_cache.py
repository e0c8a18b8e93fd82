from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_fp8.models import Decoder, DecoderConfig
from lightning_fp8.models.cache import KVCache, PlainStore
from lightning_fp8.models.config import RopeScaling
from lightning_fp8.models.fp8_store import FP8Store

BASE = DecoderConfig(vocab_size=61, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=64)
SHAPES = {
    "base": BASE,
    "windows": replace(BASE, sliding_window=5, num_full_attention_layers=1),
    "yarn": replace(BASE, rope_scaling=RopeScaling("yarn", 4.0, original_context=16), qk_norm=False),
    "soft-caps": replace(BASE, attention_softcap=5.0, logit_softcap=9.0),
    "sink": replace(BASE, attention_sink=True, sliding_window=5, num_full_attention_layers=1),
    "sink, soft-cap, clip": replace(BASE, attention_sink=True, attention_softcap=5.0, clipped_softmax=(-0.03, 1.1)),
    "layer scale, smooth": replace(BASE, layer_scale=True, smooth_swiglu=True),
}
TOKENS = torch.randint(BASE.vocab_size, (3, 24), generator=torch.Generator().manual_seed(0))


def decoder_of(config: DecoderConfig = BASE) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(replace(config, init_std=0.3))
    for p in decoder.parameters():
        if not p.any():  # sinks and LayerScales, which start at zero
            torch.nn.init.uniform_(p, 0.5, 2.0)
    return decoder.requires_grad_(False)


def read(decoder: Decoder, cache: KVCache, tokens: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat([decoder(part, cache=cache) for part in tokens.split(sizes, 1)], 1)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("sizes", [[24], [1] * 24, [10, 1, 1, 7, 5]], ids=["at once", "one by one", "in pieces"])
def test_cached_logits_are_the_uncached(config: DecoderConfig, sizes: list[int]) -> None:
    decoder = decoder_of(config)
    logits = read(decoder, KVCache(config, 3, 24, sinks=2), TOKENS, sizes)
    torch.testing.assert_close(logits, decoder(TOKENS), rtol=1e-4, atol=1e-4)


def test_rows_of_different_lengths() -> None:
    """Each text is as if alone, whatever padding stands beside it, and beyond the capacity."""
    decoder, lengths = decoder_of(), [6, 2, 4]
    cache = KVCache(BASE, 3, 10, sinks=2)
    padded = [decoder(TOKENS[:, :6], cache=cache, lengths_b=torch.tensor(lengths))]
    following = TOKENS[:, 6:]
    padded += [decoder(following[:, t : t + 1], cache=cache) for t in range(18)]
    for row, length in enumerate(lengths):
        alone = KVCache(BASE, 1, 10, sinks=2)
        text = torch.cat([TOKENS[row : row + 1, :length], following[row : row + 1]], 1)
        expected = read(decoder, alone, text, [length, *[1] * 18])[0]
        own = torch.cat([padded[0][row, :length], *(logits[row] for logits in padded[1:])])
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_a_full_cache_holds_the_first_and_the_last_tokens(sinks: int) -> None:
    """With one layer, a token's logits depend on the tokens in sight alone: read these anew, and they are the same."""
    config = replace(BASE, num_layers=1)
    decoder, cache = decoder_of(config), KVCache(config, 3, 8, sinks=sinks)
    logits = read(decoder, cache, TOKENS, [1] * 24)
    for t in range(8, 24):
        seen = torch.cat([TOKENS[:, :sinks], TOKENS[:, t - 7 + sinks : t + 1]], 1)
        torch.testing.assert_close(logits[:, t], decoder(seen)[:, -1], rtol=1e-4, atol=1e-4)


def test_memory_is_that_of_the_capacity() -> None:
    decoder, cache = decoder_of(), KVCache(BASE, 3, 8, sinks=2)
    before = cache.nbytes
    assert before == 2 * 2 * 3 * 8 * 2 * 16 * 4  # k and v, layers, rows, slots, heads, width, bytes
    read(decoder, cache, TOKENS, [1] * 24)
    assert cache.nbytes == before


def test_fp8_stores_take_a_byte_and_a_scale_a_head() -> None:
    cache = KVCache(BASE, 3, 8, store=FP8Store)
    assert cache.nbytes == 2 * 2 * 3 * 8 * 2 * (16 + 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_stores_round_each_head_of_each_token(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 16, generator=generator) * torch.logspace(-3, 3, 30).view(2, 3, 5, 1)
    x = x.to(dtype)
    store, slots = FP8Store((2, 9, 3, 16), dtype, torch.device("cpu")), torch.tensor([[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]])
    store.write(slots, x)
    back = store.read(9)
    assert back.dtype == dtype
    for row in range(2):
        own, given = back[row][:, slots[row]].float(), x[row].float()
        largest = given.abs().amax(-1, keepdim=True)
        # half a step of E4M3: 2^-4 of the value, or of the smallest normal number; and bf16's own rounding
        assert ((own - given).abs() <= given.abs() * (2**-4 + 2**-8) + largest / 448 * 2**-10).all()


def test_fp8_logits_are_close() -> None:
    decoder = decoder_of()
    plain, fp8 = (
        read(decoder, KVCache(BASE, 3, 24, store=store), TOKENS, [1] * 24) for store in (PlainStore, FP8Store)
    )
    relative = (plain - fp8).norm() / plain.norm()
    assert 1e-4 < relative < 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(KVCache, BASE, 1, 4, sinks=4), "4 sinks leave no slot of 4"),
        (lambda: KVCache(BASE, 1, 4).place(5), "5 tokens after 0 do not fit into 4 slots"),
    ],
)
def test_mistakes(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def trained_on_cycles(length: int) -> Decoder:
    """A decoder that has learnt, on texts of `length` tokens, to continue cycles of five tokens."""
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=32, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=128
    )
    decoder = Decoder(config)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=5e-3)
    for _ in range(150):
        texts = cycles(16, length + 1)
        loss = decoder(texts[:, :-1], texts[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return decoder.requires_grad_(False)


def cycles(rows: int, length: int) -> Tensor:
    return torch.rand(rows, 32).argsort(1)[:, :5].repeat(1, length // 5 + 1)[:, :length]


def test_perplexity_stays_eight_times_past_the_training_length() -> None:
    length = 32
    decoder = trained_on_cycles(length)
    texts = cycles(4, 8 * length + 1)

    def nats(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.transpose(1, 2), texts[:, 1:], reduction="none").mean(0)

    cache = KVCache(decoder.config, 4, length, sinks=4)
    streamed = nats(read(decoder, cache, texts[:, :-1], [1] * (8 * length)))
    within = nats(decoder(texts[:, :-1]))[10:length].mean()
    assert streamed.isfinite().all()
    assert streamed[length:].mean() < within + 0.1 < 1
    all_in_sight = nats(decoder(texts[:, :-1]))[4 * length :].mean()
    assert all_in_sight > within + 1  # so the cache is what makes the difference
