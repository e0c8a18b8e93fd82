import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from lightning_fp8.models import Decoder, DecoderConfig
from lightning_fp8.models.config import RopeScaling, config_from_dict, differences
from lightning_fp8.models.rope import rotary_tables, rotate
from lightning_fp8.models.scores import Attended, explicit_attention

SMALL = DecoderConfig(vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48)
OLD_FIELDS = {  # what checkpoints held before the other fields came
    *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size"),
    *("rope_theta", "norm_eps", "qk_norm", "tied_embeddings", "init_std"),
}
VARIANTS = {
    "gqa": SMALL,
    "mha": replace(SMALL, num_kv_heads=4),
    "mqa": replace(SMALL, num_kv_heads=1),
    "no qk_norm": replace(SMALL, qk_norm=False),
    "tied": replace(SMALL, tied_embeddings=True),
    "own head_dim": replace(SMALL, head_dim=10),
    "biases": replace(SMALL, qkv_bias=True, o_bias=True, mlp_bias=True),
    "windows": replace(SMALL, sliding_window=20, num_full_attention_layers=1),
    "soft-caps": replace(SMALL, attention_softcap=20.0, logit_softcap=30.0),
    "clipped": replace(SMALL, clipped_softmax=(-0.03, 1.0)),
    "sink": replace(SMALL, attention_sink=True),
    "smooth": replace(SMALL, smooth_swiglu=True),
    "penalties": replace(SMALL, z_loss=1e-4, activation_l2=1e-5),
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
    positions = torch.arange(300)
    exact = rotary_tables(positions, SMALL)
    with default_dtype(torch.bfloat16):
        tables = rotary_tables(positions, SMALL)
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
    rotated_q, rotated_k = (rotate(x.expand(length, size), *rotary_tables(torch.arange(length), SMALL)) for x in (q, k))
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
        ({"head_dim": 7}, "head_dim is 7; rotary positions need an even width"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"logit_softcap": -1.0}, "logit_softcap is -1.0; it must be above 0"),
    ],
)
def test_config_errors_name_the_field(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**fields)


def test_a_window_hides_what_is_before_it() -> None:
    """Two layers of windows of 3 reach 4 positions back, no further."""
    decoder, before = decoder_of(replace(SMALL, sliding_window=3)), tokens()
    after = before.clone()
    after[:, 2] = (after[:, 2] + 1) % SMALL.vocab_size
    differs = (decoder(before) != decoder(after)).any(-1).any(0)
    assert differs.tolist() == [2 <= t <= 6 for t in range(12)]


def test_first_layers_can_see_everything() -> None:
    decoder, before = decoder_of(replace(SMALL, sliding_window=3, num_full_attention_layers=1)), tokens()
    after = before.clone()
    after[:, 2] = (after[:, 2] + 1) % SMALL.vocab_size
    assert (decoder(before) != decoder(after)).any(-1).any(0)[2:].all()


def test_packed_documents_are_as_if_alone(config: DecoderConfig) -> None:
    decoder, first, second = decoder_of(config), tokens(7), tokens(5, batch=2).flip(0)
    numbers = torch.tensor([0] * 7 + [1] * 5).expand(2, -1)
    packed = decoder(torch.cat([first, second], 1), documents_bt=numbers)
    torch.testing.assert_close(packed, torch.cat([decoder(first), decoder(second)], 1), rtol=1e-4, atol=1e-5)


def test_soft_caps_are_those_of_the_formula() -> None:
    """Against torch's own attention: a cap far above all scores changes nothing; a low one bounds the logits."""
    high = replace(SMALL, attention_softcap=1e4)
    torch.testing.assert_close(decoder_of(high)(tokens()), decoder_of(SMALL)(tokens()), rtol=1e-5, atol=1e-6)
    low = decoder_of(replace(SMALL, logit_softcap=0.05))(tokens())
    expected = 0.05 * torch.tanh(decoder_of(SMALL)(tokens()) / 0.05)
    torch.testing.assert_close(low, expected)


def test_attention_soft_cap_by_hand() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(3)).mul(3)
    out = explicit_attention(Attended(q, k[:, :1], v[:, :1], None), 0.5, softcap=2.0)
    for head in range(2):
        for t in range(5):
            scores = torch.stack([2 * torch.tanh(q[0, head, t] @ k[0, 0, u] / 2 / 2) for u in range(t + 1)])
            torch.testing.assert_close(out[0, head, t], scores.softmax(0) @ v[0, 0, : t + 1])


def test_biases_start_at_zero_and_gains_at_one() -> None:
    for name, p in decoder_of(VARIANTS["biases"]).named_parameters():
        if p.dim() == 1:
            assert p.unique().tolist() == [0.0 if name.endswith("bias") else 1.0], name


def test_a_saved_configuration_comes_back() -> None:
    config = replace(SMALL, head_dim=8, rope_scaling=RopeScaling("yarn", 4.0, original_context=16))
    assert config_from_dict(asdict(config)) == config
    old = {name: value for name, value in asdict(SMALL).items() if name in OLD_FIELDS}
    assert config_from_dict(old) == SMALL
    with pytest.raises(ValueError, match="unknown to this version: experts"):
        config_from_dict({"experts": 8})


def test_differences_of_configurations() -> None:
    old = {name: value for name, value in asdict(SMALL).items() if name in OLD_FIELDS}
    assert differences(old, SMALL) == []
    assert differences(old, replace(SMALL, head_dim=4)) == ["head_dim is 4 here and None there"]
