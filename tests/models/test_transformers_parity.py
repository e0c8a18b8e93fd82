"""The decoder against Hugging Face `transformers`, family by family, with the same random weights."""

from dataclasses import replace
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fp8.checkpoint.families import config_from_hf, config_to_hf, weight_from_hf, weight_to_hf
from lightning_fp8.models import Decoder, DecoderConfig
from lightning_fp8.models.config import RopeScaling

transformers = pytest.importorskip("transformers")

BASE = DecoderConfig(
    vocab_size=96,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=96,
    qk_norm=False,
    context_length=64,
)
LLAMA3 = RopeScaling("llama3", factor=8.0, original_context=16)
YARN = RopeScaling("yarn", factor=4.0, original_context=16)
FAMILIES = {
    "llama 2": replace(BASE, num_kv_heads=4, norm_eps=1e-5),
    "llama 3": replace(BASE, rope_theta=500000.0, norm_eps=1e-5),
    "llama 3.1": replace(BASE, rope_theta=500000.0, rope_scaling=LLAMA3),
    "llama, tied": replace(BASE, tied_embeddings=True),
    "llama, all biases": replace(BASE, qkv_bias=True, o_bias=True, mlp_bias=True),
    "llama, interpolated": replace(BASE, rope_scaling=RopeScaling("linear", factor=4.0)),
    "llama, ntk": replace(BASE, rope_scaling=RopeScaling("ntk", factor=4.0)),
    "llama, own head_dim": replace(BASE, head_dim=24),
    "mistral": replace(BASE, sliding_window=7),
    "mistral, no window": replace(BASE, head_dim=32),
    "qwen 2.5": replace(BASE, qkv_bias=True, tied_embeddings=True, rope_theta=1e6),
    "qwen 2.5, windows and yarn": replace(
        BASE, qkv_bias=True, sliding_window=9, num_full_attention_layers=1, rope_scaling=YARN
    ),
    "qwen 3": replace(BASE, qk_norm=True, head_dim=32, rope_theta=1e6),
    "qwen 3, biases, window": replace(BASE, qk_norm=True, qkv_bias=True, o_bias=True, sliding_window=5),
    "qwen 3, yarn": replace(BASE, qk_norm=True, rope_scaling=replace(YARN, attention_factor=1.1)),
}
TOKENS = torch.randint(BASE.vocab_size, (3, 33), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES.keys())
def config(request: pytest.FixtureRequest) -> DecoderConfig:
    chosen: DecoderConfig = request.param
    return chosen


def model_of(config: DecoderConfig) -> nn.Module:
    """Hugging Face's model of what `config` is exported as."""
    theirs = config_to_hf(config, dtype="float32")
    hf = transformers.AutoConfig.for_model(**theirs)
    return transformers.AutoModelForCausalLM.from_config(hf, attn_implementation="eager")


def randomise(model: nn.Module, spread: float = 1.5, gains: float = 0.3) -> None:
    """Weights that let nothing hide: gains and biases far from 1 and 0, and scores of attention that differ."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = 1 + gains * noise if p.dim() < 2 else noise * (spread / p.shape[1] ** 0.5)


def renamed(model: nn.Module) -> dict[str, Tensor]:
    return {weight_to_hf(name): p for name, p in model.named_parameters()}


def logits_and_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of the model in its own dtype, by Hugging Face's names."""
    model.zero_grad()
    out: Any = model(TOKENS[:, :-1])
    logits = out if isinstance(out, Tensor) else out.logits
    F.cross_entropy(logits.flatten(0, 1).float(), TOKENS[:, 1:].flatten()).backward()
    gradients = renamed(model) if isinstance(model, Decoder) else dict(model.named_parameters())
    return {"logits": logits.detach(), **{name: p.grad for name, p in gradients.items()}}


def distances(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor, the largest difference over the largest magnitude."""
    assert ours.keys() == theirs.keys()
    return {
        name: ((ours[name].float() - b.float()).abs().max() / b.float().abs().max()).item()
        for name, b in theirs.items()
    }


def test_logits_and_gradients_in_fp32(config: DecoderConfig) -> None:
    ours, theirs = Decoder(config), model_of(config)
    randomise(ours)
    theirs.load_state_dict(renamed(ours), strict=not config.tied_embeddings)
    apart = distances(logits_and_gradients(ours), logits_and_gradients(theirs))
    assert len(apart) == len(list(ours.parameters())) + 1
    assert {name: d for name, d in apart.items() if not d <= 1e-5} == {}


def in_bf16_and_exact(config: DecoderConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Ours and theirs in bf16, and theirs in fp32, all of the same bf16 weights."""
    ours, theirs = Decoder(config), model_of(config)
    randomise(ours, spread=0.16, gains=0)  # as at the beginning of a training: deviation 0.02
    ours.bfloat16()
    theirs.load_state_dict(renamed(ours), strict=not config.tied_embeddings)
    exact = {name: x.clone() for name, x in logits_and_gradients(theirs).items()}
    return logits_and_gradients(ours), logits_and_gradients(theirs.bfloat16()), exact


def test_logits_and_gradients_in_bf16(config: DecoderConfig) -> None:
    """Logits agree to 1e-2, and so does half of the gradients with those in fp32.

    Not all do, here or in `transformers` (which rounds rotations and scores to bf16 too): the gradient of a key's bias
    is what is left when terms cancel. Ours must not be the further ones.
    """
    own, rounded, exact = in_bf16_and_exact(config)
    assert distances(own, rounded)["logits"] <= 1e-2
    error, their_error = (median(distances(x, exact).values()) for x in (own, rounded))
    assert error <= min(1e-2, 1.25 * their_error)


def test_no_more_gradients_are_beyond_the_bar_in_bf16_than_in_transformers() -> None:
    """Of 374 tensors in all families, further than 1e-2 from fp32 when this was written: 61 of ours, 91 of theirs.

    So no implementation in bf16 can be within 1e-2 of another in every tensor.
    """
    ours = theirs = 0
    for config in FAMILIES.values():
        own, rounded, exact = in_bf16_and_exact(config)
        ours += sum(distance > 1e-2 for distance in distances(own, exact).values())
        theirs += sum(distance > 1e-2 for distance in distances(rounded, exact).values())
    assert 0 < ours <= theirs


def test_weights_and_configuration_from_transformers(config: DecoderConfig) -> None:
    """The other direction: their model, their configuration as they save it."""
    theirs = model_of(config)
    randomise(theirs)
    ours = Decoder(config_from_hf(theirs.config.to_dict()))
    ours.load_state_dict(
        {weight_from_hf(name): p for name, p in theirs.named_parameters()}, strict=not config.tied_embeddings
    )
    apart = distances(logits_and_gradients(ours), logits_and_gradients(theirs))
    assert {name: d for name, d in apart.items() if not d <= 1e-5} == {}


def test_configuration_comes_back(config: DecoderConfig) -> None:
    back = config_from_hf(config_to_hf(config, dtype="float32"))
    if config.rope_scaling and config.rope_scaling.kind == "ntk":  # exported as the base that it amounts to
        assert back.rope_theta > config.rope_theta
        back = replace(back, rope_theta=config.rope_theta, rope_scaling=config.rope_scaling)
    assert replace(back, head_dim=config.head_dim) == config
    assert back.head_size == config.head_size
