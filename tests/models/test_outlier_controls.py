"""What keeps outliers out of activations: each control off, on, by its formula, and doing what it is for."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fp8 import convert_linears
from lightning_fp8.models import Decoder, DecoderConfig
from lightning_fp8.models.loss import next_token_loss
from lightning_fp8.models.scores import Attended, explicit_attention, with_sink

SMALL = DecoderConfig(vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48)
TOKENS = torch.randint(97, (2, 13), generator=torch.Generator().manual_seed(1))
ALL = {
    "attention_sink": True,
    "layer_scale": True,
    "smooth_swiglu": True,
    "clipped_softmax": (-0.03, 1.1),
    "z_loss": 1e-2,
    "activation_l2": 1e-2,
}


def decoder_of(config: DecoderConfig = SMALL, **options: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(config, **options)


def wake(decoder: Decoder) -> Decoder:
    """Gives what starts at zero a value."""
    torch.manual_seed(2)
    for p in decoder.parameters():
        if not p.any():
            nn.init.uniform_(p, 0.5, 1.5)
    return decoder


def gradients(decoder: Decoder) -> tuple[Tensor, dict[str, Tensor]]:
    decoder.zero_grad()
    loss = decoder(TOKENS[:, :-1], TOKENS[:, 1:])
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


def test_all_is_off_by_default_but_qk_norm() -> None:
    assert DecoderConfig().qk_norm
    block = {"attention_norm", "mlp_norm", "attention.q_norm", "attention.k_norm"}
    block |= {f"attention.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    expected = {f"blocks.{i}.{name}.weight" for i in range(2) for name in block}
    assert set(decoder_of().state_dict()) == expected | {"embedding.weight", "norm.weight", "lm_head.weight"}


def test_what_is_added_to_the_state_dict() -> None:
    added = set(decoder_of(replace(SMALL, **ALL)).state_dict()) - set(decoder_of().state_dict())
    names = ("attention.sink_logit", "attention_scale.weight", "mlp_scale.weight")
    assert added == {f"blocks.{i}.{name}" for i in range(2) for name in names}


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute: Any) -> None:
    config = replace(SMALL, **ALL)
    loss, grads = gradients(wake(decoder_of(config)))
    again, same = gradients(wake(decoder_of(config, activation_checkpointing=recompute)))
    assert torch.equal(loss, again)
    for name, grad in grads.items():
        torch.testing.assert_close(same[name], grad, rtol=1e-5, atol=1e-8, msg=name)


# Attention sink.


def attention(seed: int = 0, length: int = 6) -> tuple[Attended, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, heads, length, 8, generator=gen) for heads in (4, 2, 2))
    return Attended(q, k, v, None), torch.randn(4, generator=gen)


def sunk(x: Attended, sink_h: Tensor) -> Tensor:
    """Attention with a sink, by its formula, in fp64."""
    q, k, v = (t.double() for t in x[:3])
    scores = q @ k.repeat_interleave(2, 1).mT / 8**0.5
    mask = torch.ones(scores.shape[-2:]).tril().bool() if x.mask is None else x.mask
    weights = scores.exp().masked_fill(~mask, 0.0)
    return weights @ v.repeat_interleave(2, 1) / (weights.sum(-1, keepdim=True) + sink_h.double().exp()[:, None, None])


def fused(x: Attended, sink_h: Tensor) -> Tensor:
    causal = x.mask is None
    y = with_sink(x, sink_h, 8**-0.5)
    out = F.scaled_dot_product_attention(*y[:3], attn_mask=y.mask, is_causal=causal, scale=8**-0.5, enable_gqa=True)
    return out[:, :, causal:, :8]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("how", ["fused", "explicit"])
def test_a_sink_is_one_more_term_of_the_softmax(masked: bool, how: str) -> None:
    x, sink_h = attention()
    if masked:
        x = x._replace(mask=torch.ones(6, 6).tril().triu(-2).bool())
    tensors = [t.requires_grad_() for t in (*x[:3], sink_h)]
    explicit = explicit_attention(with_sink(x, sink_h, 8**-0.5), 8**-0.5)[:, :, not masked :, :8]
    own = fused(x, sink_h) if how == "fused" else explicit
    expected = sunk(x, sink_h)
    torch.testing.assert_close(own.double(), expected, rtol=1e-5, atol=1e-6)
    dy = torch.randn(own.shape, generator=torch.Generator().manual_seed(4))
    own_grads = torch.autograd.grad(own, tensors, dy)
    for a, b in zip(own_grads, torch.autograd.grad(expected, tensors, dy.double()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_sink_far_below_the_scores_is_none() -> None:
    plain, with_one = decoder_of(), decoder_of(replace(SMALL, attention_sink=True))
    assert all((b.attention.sink_logit == 0).all() for b in with_one.blocks)  # type: ignore[union-attr]
    for block in with_one.blocks:
        nn.init.constant_(block.attention.sink_logit, -60.0)  # type: ignore[union-attr, arg-type]
    torch.testing.assert_close(with_one(TOKENS), plain(TOKENS), rtol=1e-5, atol=1e-6)


def test_a_head_with_a_sink_can_attend_to_nothing() -> None:
    x, _ = attention()
    with_one, without = fused(x, torch.full((4,), 20.0)), F.scaled_dot_product_attention(*x[:3], enable_gqa=True)
    assert with_one.abs().max() < 1e-6 < 0.1 < without.abs().mean()


# Clipped softmax.


def test_clipped_softmax_by_hand() -> None:
    x, _ = attention(length=9)
    own = explicit_attention(x, 8**-0.5, clip=(-0.03, 1.1))
    scores = x.q_bhts @ x.k_bkus.repeat_interleave(2, 1).mT / 8**0.5
    p = scores.masked_fill(~torch.ones(9, 9).tril().bool(), float("-inf")).softmax(-1)
    stretched = 1.13 * p - 0.03
    assert ((stretched < 0) & (p > 0)).any()  # a head gives these tokens exactly nothing
    torch.testing.assert_close(own, stretched.clamp(0, 1) @ x.v_bkus.repeat_interleave(2, 1), rtol=1e-5, atol=1e-6)


def test_a_clip_of_nothing_changes_nothing() -> None:
    clipped = decoder_of(replace(SMALL, clipped_softmax=(0.0, 1.0)))
    torch.testing.assert_close(clipped(TOKENS), decoder_of()(TOKENS), rtol=1e-5, atol=1e-6)


# LayerScale.


def test_blocks_with_layer_scale_start_as_the_identity() -> None:
    decoder = decoder_of(replace(SMALL, layer_scale=True))
    assert torch.equal(decoder(TOKENS), decoder.lm_head(decoder.norm(decoder.embedding(TOKENS))))
    _, grads = gradients(decoder)
    assert all(grads[f"blocks.{i}.{part}_scale.weight"].any() for i in range(2) for part in ("attention", "mlp"))
    for block in decoder.blocks:
        nn.init.ones_(block.attention_scale.weight)  # type: ignore[union-attr, arg-type]
        nn.init.ones_(block.mlp_scale.weight)  # type: ignore[union-attr, arg-type]
    assert torch.equal(decoder(TOKENS), decoder_of()(TOKENS))


# Penalties.


@pytest.mark.parametrize("targets", ["all", "some"])
@pytest.mark.parametrize("chunked", [False, True])
def test_z_loss_adds_its_gradient_and_no_value(chunked: bool, targets: str) -> None:
    torch.manual_seed(0)
    x, head = torch.randn(3, 8, 16, requires_grad=True), nn.Linear(16, 64, bias=False)
    wanted = torch.randint(64, (3, 8))
    if targets == "some":
        wanted[0, ::3] = -100
    logits = head(x).float()
    counted = wanted != -100
    penalty = 0.1 * logits.logsumexp(-1)[counted].square().mean()
    plain = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    expected = torch.autograd.grad(plain + penalty, [x, head.weight])
    loss = next_token_loss(x, head, wanted, z_loss=0.1, chunk_logits=5 * 64 if chunked else 1000 * 64)
    torch.testing.assert_close(loss, plain, rtol=1e-6 if chunked else 0, atol=0)
    for a, b in zip(torch.autograd.grad(loss, [x, head.weight]), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_activation_l2_adds_its_gradient_and_no_value() -> None:
    plain, penalised = decoder_of(), decoder_of(replace(SMALL, activation_l2=0.5))
    loss, grads = gradients(penalised)
    streams: list[Tensor] = []
    for block in plain.blocks:
        block.register_forward_hook(lambda m, a, out: streams.append(out))
    value = plain(TOKENS[:, :-1], TOKENS[:, 1:])
    assert torch.equal(loss, value.detach())
    (value + 0.5 * torch.stack([x.square().mean() for x in streams]).mean()).backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("option", ["z_loss", "activation_l2"])
def test_penalties_shrink_what_they_are_of(option: str) -> None:
    """After 40 steps, against the same run without: the log-partition function, the residual stream."""

    def measure(decoder: Decoder) -> float:
        with torch.no_grad():
            if option == "z_loss":
                return float(decoder(TOKENS).logsumexp(-1).square().mean())
            streams: list[Tensor] = []
            hooks = [block.register_forward_hook(lambda m, a, out: streams.append(out)) for block in decoder.blocks]
            decoder(TOKENS)
            for hook in hooks:
                hook.remove()
            return float(torch.stack(streams).square().mean())

    after = []
    for weight in (0.0, 1.0):
        decoder = decoder_of(replace(SMALL, **{option: weight}))
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(40):
            gradients(decoder)
            optimizer.step()
        after.append(measure(decoder))
    assert after[1] < after[0] / 2


def test_evaluation_has_no_penalty() -> None:
    penalised = decoder_of(replace(SMALL, z_loss=1.0, activation_l2=1.0))
    assert torch.equal(penalised(TOKENS), decoder_of()(TOKENS))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"z_loss": -1.0}, "z_loss is -1.0"),
        ({"activation_l2": float("nan")}, "activation_l2 is nan"),
        ({"clipped_softmax": (0.1, 1.0)}, "gamma must be at most 0"),
    ],
)
def test_errors_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**fields)


def test_a_model_with_all_of_it_trains_in_fp8() -> None:
    decoder = wake(decoder_of(replace(SMALL, **ALL)))
    report = convert_linears(decoder)
    assert len(report.converted) == 14
    before, grads = gradients(decoder)
    assert all(grad.isfinite().all() and grad.any() for grad in grads.values())
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    for _ in range(10):
        gradients(decoder)
        optimizer.step()
    assert gradients(decoder)[0] < before - 0.5
