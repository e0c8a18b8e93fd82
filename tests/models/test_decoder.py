import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_fp8.models import Decoder, DecoderConfig
from lightning_fp8.models.decoder import rotary_tables, rotate

SMALL = DecoderConfig(vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48)
VARIANTS = {
    "gqa": SMALL,
    "mha": replace(SMALL, num_kv_heads=4),
    "mqa": replace(SMALL, num_kv_heads=1),
    "no qk_norm": replace(SMALL, qk_norm=False),
    "tied": replace(SMALL, tied_embeddings=True),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def decoder_of(config: DecoderConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    with default_dtype(dtype):
        return Decoder(config)


def tokens(length: int = 12, batch: int = 2) -> Tensor:
    return torch.randint(SMALL.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def config(request: pytest.FixtureRequest) -> DecoderConfig:
    chosen: DecoderConfig = request.param
    return chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits(config: DecoderConfig, dtype: torch.dtype) -> None:
    logits = decoder_of(config, dtype)(tokens())
    assert logits.shape == (2, 12, config.vocab_size)
    assert logits.dtype == dtype


@pytest.mark.parametrize("changed", [0, 5, 11])
def test_a_token_changes_nothing_before_it(config: DecoderConfig, changed: int) -> None:
    decoder, before = decoder_of(config), tokens()
    after = before.clone()
    after[:, changed] = (after[:, changed] + 1) % config.vocab_size
    differs = (decoder(before) != decoder(after)).any(-1).any(0)
    assert not differs[:changed].any()
    assert differs[changed:].all()


def test_grouped_heads_are_repeated_heads() -> None:
    grouped, full = decoder_of(SMALL), decoder_of(VARIANTS["mha"], seed=1)
    state = grouped.state_dict()
    for name, weight in state.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = weight.unflatten(0, (SMALL.num_kv_heads, SMALL.head_size))
            state[name] = heads.repeat_interleave(SMALL.num_heads // SMALL.num_kv_heads, 0).flatten(0, 1)
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(tokens()), full(tokens()), rtol=1e-5, atol=1e-6)


def test_tied_head_is_the_embedding() -> None:
    decoder = decoder_of(VARIANTS["tied"])
    assert decoder.lm_head.weight is decoder.embedding.weight
    assert [name for name, p in decoder.named_parameters() if p.shape == (97, 32)] == ["embedding.weight"]


def test_rotary_tables_do_not_follow_the_default_dtype() -> None:
    cpu = torch.device("cpu")
    exact = rotary_tables(300, SMALL, cpu)
    with default_dtype(torch.bfloat16):
        tables = rotary_tables(300, SMALL, cpu)
    for table, expected in zip(tables, exact, strict=True):
        assert table.dtype == torch.float32
        assert torch.equal(table, expected)
    angles = torch.arange(300, dtype=torch.float64)[:, None] * 10000.0 ** -(
        torch.arange(0, 8, 2, dtype=torch.float64) / 8
    )
    torch.testing.assert_close(exact[0][:, :4].double(), angles.cos(), rtol=0, atol=1e-4)
    torch.testing.assert_close(exact[1][:, 4:].double(), angles.sin(), rtol=0, atol=1e-4)


def test_rotation_keeps_norms_and_knows_distances_only() -> None:
    length, size = 40, SMALL.head_size
    q, k = torch.randn(2, size, generator=torch.Generator().manual_seed(2))
    rotated_q, rotated_k = (rotate(x.expand(length, size), *rotary_tables(length, SMALL, q.device)) for x in (q, k))
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(length))
    scores = rotated_q @ rotated_k.T
    for distance in (-7, 0, 3):
        same_distance = scores.diagonal(distance)
        torch.testing.assert_close(same_distance, same_distance[0].expand_as(same_distance), rtol=1e-4, atol=1e-4)
    assert (scores.diagonal(3)[0] - scores.diagonal(0)[0]).abs() > 0.1


def test_bf16_and_fp32_start_from_the_same_weights(config: DecoderConfig) -> None:
    exact = decoder_of(config).state_dict()
    rounded = decoder_of(config, torch.bfloat16).state_dict()
    assert exact.keys() == rounded.keys()
    for name, weight in exact.items():
        assert torch.equal(weight.bfloat16(), rounded[name]), name


def test_initial_spread() -> None:
    config = replace(SMALL, hidden_size=128, intermediate_size=256, num_layers=8)
    spreads = {name: p.std().item() for name, p in decoder_of(config).named_parameters() if p.dim() == 2}
    residual = config.init_std / math.sqrt(16)
    for name, spread in spreads.items():
        expected = residual if "o_proj" in name or "down_proj" in name else config.init_std
        assert spread == pytest.approx(expected, rel=0.05), name


def test_initial_loss_is_that_of_a_uniform_guess(config: DecoderConfig) -> None:
    sequence = tokens(length=64, batch=4)
    logits = decoder_of(config)(sequence[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequence[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(config.vocab_size), abs=0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_layers": -1}, "num_layers is -1"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0"),
        ({"hidden_size": 36, "num_heads": 4}, "hidden_size 36 does not divide into 4 heads of even width"),
        ({"hidden_size": 40, "num_heads": 3}, "hidden_size 40 does not divide into 3 heads"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
    ],
)
def test_config_errors_name_the_field(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**fields)
