"""Models that other people wrote: converted with one call, trained, and saved for the unconverted model."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torchvision.models import VisionTransformer
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_fp8 import convert_linears
from lightning_fp8.compute.gemm import record_gemms


def llama(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).bfloat16()


def llama_loss(model):
    tokens = torch.arange(64).remainder(128).view(2, 32)
    return model(input_ids=tokens, labels=tokens).loss


def vit(seed):
    torch.manual_seed(seed)
    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=16
    ).bfloat16()


def vit_loss(model):
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    return F.cross_entropy(model(images), torch.arange(8))


PER_LLAMA_BLOCK = {f"self_attn.{p}_proj" for p in "qkvo"} | {f"mlp.{p}_proj" for p in ("gate", "up", "down")}
LLAMA = {f"model.layers.{i}.{name}" for i in range(2) for name in PER_LLAMA_BLOCK}
VIT = {f"encoder.layers.encoder_layer_{i}.mlp.{j}" for i in range(2) for j in (0, 3)} | {"heads.head"}


@pytest.mark.parametrize(
    ("build", "loss_of", "converted"), [(llama, llama_loss, LLAMA), (vit, vit_loss, VIT)], ids=["llama", "vit"]
)
def test_a_foreign_model_converts_trains_and_saves_unchanged(build, loss_of, converted):
    model, plain = build(seed=0), build(seed=1)
    keys = list(model.state_dict())
    report = convert_linears(model)
    assert set(report.converted) == converted
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(10):
        with record_gemms() as gemms:
            loss = loss_of(model)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert len(gemms) == 3 * len(converted)
    state = model.state_dict()
    assert list(state) == keys
    plain.load_state_dict(copy.deepcopy(state), strict=True)
    model.eval()
    plain.eval()
    # The unconverted model computes the same up to the casts: E4M3 has three mantissa bits.
    assert abs(loss_of(plain).item() - loss_of(model).item()) < 2**-3 * losses[0]


def test_what_a_vit_multiplies_itself_is_reported():
    kept = convert_linears(vit(seed=0)).kept
    attention = "encoder.layers.encoder_layer_0.self_attention"
    assert "MultiheadAttention" in kept[f"{attention}.in_proj_weight"]
    assert "NonDynamicallyQuantizableLinear" in kept[f"{attention}.out_proj"]


def test_a_tied_head_of_a_foreign_model_is_found():
    model = llama(seed=0)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert "tied" in convert_linears(model, keep_high_precision=()).kept["lm_head"]
