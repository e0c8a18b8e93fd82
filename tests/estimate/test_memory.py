"""Estimates are counted on fake tensors; here against what a CPU really holds."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lightning_fp8 import convert_linears
from lightning_fp8.compute import PRESETS
from lightning_fp8.compute.activations import keep_activations_in_fp8
from lightning_fp8.estimate import Setup, activations, device_memory
from lightning_fp8.estimate.memory import LiveBytes
from lightning_fp8.estimate.setup import layers
from lightning_fp8.hardware import ACCELERATORS
from lightning_fp8.models import Decoder, DecoderConfig
from lightning_fp8.models.loss import CHUNK_LOGITS
from lightning_fp8.models.recompute import Recompute
from lightning_fp8.optim.estimate import MODES

CONFIG = DecoderConfig(
    vocab_size=512, hidden_size=128, num_layers=5, num_heads=4, num_kv_heads=2, intermediate_size=384, qk_norm=True
)


def measured(preset: str | None) -> tuple[int, int]:
    """Bytes of the storages that autograd saves of five blocks, and of all that is alive; weights apart."""
    model = Decoder(CONFIG).bfloat16()
    if preset:
        convert_linears(model, preset, backend="emulated")
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive = alive_after_forward(model)
    return sum(size for storage, size in kept.items() if storage not in own), alive


def alive_after_forward(model: Decoder) -> int:
    """Bytes that a CPU holds when a forward pass is over, weights apart."""
    tokens = torch.randint(512, (3, 64))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # rotations too, as under the plugin
    try:
        with LiveBytes() as live:
            loss = model(tokens, tokens)
            alive = live.without(model)
    finally:
        torch.set_default_dtype(before)
    assert loss.isfinite()
    return alive


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_estimate_is_what_a_forward_pass_leaves(preset: str | None) -> None:
    estimated = activations(CONFIG, 3, 64, PRESETS[preset] if preset else None)
    saved, alive = measured(preset)
    assert estimated.kept == pytest.approx(alive, rel=1e-4)  # delayed scaling's state is some bytes a layer
    if preset == "rowwise_gw_hp":
        # Inputs stay in bf16 for the weight gradient, and with them the casts that layers share, for as long.
        saved += 5 * 3 * 64 * (3 * 128 + 384 + 4 * 4)
    assert estimated.kept == pytest.approx(saved, rel=0.01)
    assert estimated.recomputed == 0


@pytest.mark.parametrize("preset", [None, "tensorwise"])
@pytest.mark.parametrize("how", ["none", "full"])
@pytest.mark.parametrize(
    "patterns", [("*.mlp", "*_norm"), ("*norm",), ("blocks.3.mlp", "norm"), ("blocks.[1-4].mlp_norm",)], ids=str
)
def test_estimate_knows_what_is_kept_in_fp8(preset: str | None, how: Recompute, patterns: Sequence[str]) -> None:
    recipe = PRESETS[preset] if preset else None
    estimated = activations(CONFIG, 3, 64, recipe, how, patterns)
    model = Decoder(CONFIG, activation_checkpointing=how).bfloat16()
    if preset:
        convert_linears(model, preset, backend="emulated")
    keep_activations_in_fp8(model, patterns)
    assert estimated.kept == pytest.approx(alive_after_forward(model), rel=1e-4)
    plain = activations(CONFIG, 3, 64, recipe, how)
    inside_alone = "norm" not in patterns and "*norm" not in patterns
    assert (estimated.kept < plain.kept) is not (how == "full" and inside_alone)  # recomputed blocks keep nothing else
    assert estimated.recomputed == plain.recomputed


def test_a_pattern_that_chooses_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no module's name matches"):
        activations(CONFIG, 3, 64, None, fp8_activations=["blocks.7.mlp"])


def test_checkpointing_keeps_less_and_computes_a_block_again() -> None:
    """In full, a block keeps its input of [3, 64, 128] in bf16, and nothing else."""
    kept = {how: activations(CONFIG, 3, 64, None, how) for how in ("none", "selective", "full")}
    assert kept["none"].kept > kept["selective"].kept > kept["full"].kept
    per_block = 3 * 64 * 128 * 2
    one = activations(DecoderConfig(**{**vars(CONFIG), "num_layers": 1}), 3, 64, None, "full")
    assert kept["full"].kept - one.kept == 4 * per_block
    assert kept["full"].recomputed > kept["selective"].recomputed > 0
    assert kept["full"].recomputed + per_block == (kept["none"].kept - none_of_one()) / 4


def none_of_one() -> int:
    return activations(DecoderConfig(**{**vars(CONFIG), "num_layers": 1}), 3, 64, None).kept


def test_fp8_keeps_less_than_bf16() -> None:
    assert activations(CONFIG, 3, 64, PRESETS["tensorwise"]).kept < activations(CONFIG, 3, 64, None).kept


def test_products_that_checkpointing_keeps_are_as_large_in_fp8() -> None:
    """Those of hardware; emulated ones would leave unscaled products behind as well."""
    kept = [activations(CONFIG, 3, 64, recipe, "selective").kept for recipe in (None, PRESETS["tensorwise"])]
    assert kept[0] == kept[1]


def test_logits_are_those_of_a_chunk() -> None:
    config = DecoderConfig(vocab_size=131072, hidden_size=64, num_heads=2, num_kv_heads=2, intermediate_size=64)
    assert activations(config, 1, 64, None).logits == 64 * 131072 * 14
    assert activations(config, 1, 1024, None).logits == CHUNK_LOGITS * 14


@pytest.mark.parametrize("changes", [{}, {"tied_embeddings": True}, {"qk_norm": False}, {"head_dim": 64}])
def test_parameters_are_counted(changes: dict[str, object]) -> None:
    config = DecoderConfig(**{**vars(CONFIG), **changes})
    with torch.device("meta"):
        model = Decoder(config)
    parameters = list(model.parameters())
    assert layers(config).parameters == sum(p.numel() for p in parameters)
    assert layers(config).tensors == len(parameters)
    shapes = [(m.in_features, m.out_features) for m in model.blocks[0].modules() if isinstance(m, nn.Linear)]
    assert sorted(layers(config).linears) == sorted(shapes)


def test_a_device_holds_its_part() -> None:
    with torch.device("meta"):
        model = Decoder(CONFIG)
    count = layers(CONFIG).parameters
    setup = Setup(CONFIG, 3, 64, ACCELERATORS["h100"], devices=4)
    options = {"fp8": True, "activations": 1000.0}
    whole = device_memory(model, MODES[1], setup, sharded=False, cached=False, **options)
    assert (whole.weights, whole.grads, whole.moments) == pytest.approx((2 * count, 2 * count, 8 * count), rel=0.01)
    assert whole.exchange == whole.grads  # DDP's buckets
    assert whole.copies == 2 * 384 * 128  # the largest layer, in both layouts
    assert whole.total == pytest.approx(14 * count + 2 * 384 * 128 + 1000, rel=0.01)
    part = device_memory(model, MODES[1], setup, sharded=True, cached=True, **options)
    assert part.weights == pytest.approx(whole.weights / 4, rel=0.01)
    block = sum(k * n for k, n in layers(CONFIG).linears)
    assert part.copies == 2 * 5 * block
    alone = device_memory(model, MODES[1], setup._replace(devices=1), sharded=False, cached=False, **options)
    assert alone.exchange == 0
