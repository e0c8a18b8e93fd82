"""What is measured is what the layers compute with: their casts, attention as it ran, logits as the loss saw them."""

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch.nn import functional as F

from lightning_fp8 import FP8Precision, convert_linears, end_step
from lightning_fp8.callbacks.watch.decoders import decoder_places, watch_decoder
from lightning_fp8.callbacks.watch.linears import linear_places, watch_linear
from lightning_fp8.callbacks.watch.optimizers import measure_optimizer, optimizer_places
from lightning_fp8.callbacks.watch.tally import Tally
from lightning_fp8.compute import linear
from lightning_fp8.compute.recipe import Operand, Recipe
from lightning_fp8.compute.transformer_engine.layers import ConvertedLinear
from lightning_fp8.models import Decoder, DecoderLM, attention
from lightning_fp8.models.flex import block_mask
from lightning_fp8.models.masks import documents
from lightning_fp8.numerics import dequantize
from lightning_fp8.optim import FP8AdamW
from tests.callbacks.monitored import LAYERS, SHAPE, fit, health_tracked, listening, model

RECIPES = {
    **{name: name for name in ("tensorwise", "delayed", "rowwise", "rowwise_gw_hp", "blockwise", "mxfp8")},
    "backward only": Recipe(high_precision=("forward",)),
    "e4m3 gradients": Recipe(grad_output=Operand("e4m3")),
}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    for name in ("draw_heat_map", "draw_layers"):
        monkeypatch.setattr(f"lightning_fp8.callbacks.monitor.{name}", lambda readings, path: None)


def worst_blocks(exact, value):
    """The decibels that 5 % of the blocks of 128 do not reach."""
    signal, noise = ((x**2).reshape(-1, 128).sum(1) for x in (exact, exact - value))
    db = np.where(noise > 0, 10 * np.log10(signal / np.where(noise > 0, noise, 1)), 63.5)[signal > 0]
    return np.percentile(np.clip(db, 0, 63.5), 5, method="inverted_cdf")


class One(torch.nn.Module):
    """Calls one layer with what it is given."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.layer = torch.nn.Linear(inputs, outputs, bias=False)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_error_is_that_of_the_casts_that_the_gemms_were_given(monkeypatch, recipe):
    """Two steps: under delayed scaling the second one uses the scale of the first, and what has grown saturates."""
    torch.manual_seed(0)
    net = One(256, 128).bfloat16()
    convert_linears(net, recipe, keep_high_precision=())
    given = {}
    original = linear._How.cast

    def noted(how, x, role, *, rows=False, columns=False, made=None):
        cast = original(how, x, role, rows=rows, columns=columns, made=made)
        found = cast.rows if rows else cast.columns
        if found is not None and role not in given:
            given[role] = x.detach().reshape(-1, x.shape[-1]).clone(), found
        return cast

    monkeypatch.setattr(linear._How, "cast", noted)
    tally = Tally(dict(linear_places("layer", net.layer)), torch.device("cpu"))
    for size in (1.0, 5.0):
        given.clear()
        handles = watch_linear("layer", net.layer, tally)
        x = (size * torch.randn(256, 256) * 2.0 ** (-12 * torch.rand(256, 256))).bfloat16().requires_grad_()
        net.layer(x).backward(torch.randn(256, 128).bfloat16() * 2.0 ** (-30 * torch.rand(256, 128)).bfloat16() * size)
        figures = tally.read()["layer"]
        for handle in handles:
            handle.remove()
        end_step(net)
    assert set(given) == {"input", "weight", "grad_output"}
    for role, (x, cast) in given.items():
        exact, value = x.double().numpy(), dequantize(cast).double().numpy()
        found, noise = figures[role], ((exact - value) ** 2).sum()
        assert found["amax"] == np.abs(exact).max()
        assert found["sqnr"] == pytest.approx(10 * math.log10((exact**2).sum() / noise), abs=1e-5)
        assert found["underflow"] == ((exact != 0) & (value == 0)).sum() / (exact != 0).sum()
        cosine = (exact * value).sum() / np.linalg.norm(exact) / np.linalg.norm(value)
        assert found["cosine_distortion"] == pytest.approx(1 - cosine, rel=1e-4, abs=1e-7)
        assert found["block_sqnr_p5"] == pytest.approx(worst_blocks(exact, value), abs=1)
        grew = net.layer.fp8_recipe.scaling == "delayed" and role != "weight"
        assert (found["saturation"] > 0) == (found["scale_lag"] > 0) == grew
    assert figures["grad_output"]["underflow"] > 0
    exact = given["input"][0].double().numpy()
    energy, sizes = (exact**2).mean(0), np.abs(exact)
    assert figures["input"]["kurtosis"] == pytest.approx((energy**2).mean() / energy.mean() ** 2, rel=1e-9)
    lower_median = np.sort(sizes, 1)[:, (sizes.shape[1] - 1) // 2]
    assert figures["input"]["max_median_ratio"] == pytest.approx((sizes.max(1) / lower_median).mean(), rel=1e-6)


def test_scale_drift_is_in_octaves_since_the_last_reading(prepared, tmp_path):
    """A scale of one tensor is its amax over the largest number of the format."""
    monitor, readings = listening()
    fit(tmp_path, prepared, monitor, steps=3)
    assert {figure.value for figure in readings[0].figures() if figure.metric == "scale_drift"} == {0.0}
    for before, now in pairwise(readings):
        for layer in LAYERS:
            for role in ("input", "weight", "grad_output"):
                found, last = now.values[layer][role], before.values[layer][role]
                assert found["scale_drift"] == pytest.approx(abs(math.log2(found["amax"] / last["amax"])), abs=1e-6)
    assert max(figure.value for figure in readings[1].figures() if figure.metric == "scale_drift") > 0.1


def test_a_layer_in_bf16_is_measured_as_if_it_were_cast_by_its_own_amax(prepared, tmp_path):
    """Its remembered scale would be that of long ago."""

    class Off(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            layer = pl_module.get_submodule(LAYERS[0])
            layer.fp8_active = trainer.global_step < 1
            if not layer.fp8_active:
                layer.fp8_scales.scale.fill_(1e-6)

    monitor, readings = listening()
    fit(tmp_path, prepared, Off(), monitor, recipe="delayed", steps=2)
    for role in ("input", "weight", "grad_output"):
        assert readings[1].values[LAYERS[0]][role]["saturation"] == 0
        assert readings[1].values[LAYERS[0]][role]["scale_lag"] == 0


def test_transformer_engines_layers_have_figures_of_their_operands_alone():
    layer = ConvertedLinear.__new__(ConvertedLinear)
    torch.nn.Linear.__init__(layer, 32, 16)
    layer.fp8_active, layer.fp8_fallback = False, False
    tally = Tally(dict(linear_places("layer", layer)), torch.device("cpu"))
    watch_linear("layer", layer, tally)
    x = torch.randn(4, 32)
    layer(x).sum().backward()
    figures = tally.read()["layer"]
    assert {role: set(metrics) for role, metrics in figures.items()} == {
        "input": {"amax", "kurtosis", "max_median_ratio"},
        "weight": {"amax"},
        "grad_output": {"amax"},
    }
    assert figures["input"]["amax"] == x.abs().max()
    assert figures["grad_output"]["amax"] == 1


@pytest.mark.parametrize("shape", [{}, {"qk_norm": False}, {"sliding_window": 3}], ids=["plain", "no norm", "window"])
@pytest.mark.parametrize("documents", [False, True])
def test_attention_and_log_z_are_those_of_the_pass_itself(prepared, tmp_path, monkeypatch, shape, documents):
    """Taken from what the kernel and the loss were given; 8 tokens are fewer than would be left out."""
    attended, logits = [], []
    kernel, loss = F.scaled_dot_product_attention, F.cross_entropy

    def noted_kernel(q, k, v, attn_mask=None, **options):
        attended.append((q.detach().double().numpy(), k.detach().double().numpy(), attn_mask))
        return kernel(q, k, v, attn_mask=attn_mask, **options)

    def noted_loss(scores, *args, **options):
        logits.append(scores.detach().double().numpy())
        return loss(scores, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted_kernel)
    monkeypatch.setattr(F, "cross_entropy", noted_loss)
    torch.manual_seed(0)
    module = DecoderLM(replace(SHAPE, **shape), end_of_text=3 if documents else None)
    monitor, (readings) = listening()
    fit(tmp_path, prepared, monitor, module=module, steps=1, plugins=[FP8Precision(weights="fp32")])
    values = readings[0].values
    for layer, (q, k, mask) in enumerate(attended):
        k = k.repeat(q.shape[1] // k.shape[1], 1)
        scores = q @ k.swapaxes(2, 3) / math.sqrt(q.shape[-1])
        seen = np.tril(np.ones(scores.shape[-2:], bool)) if mask is None else mask.numpy()
        seen = np.broadcast_to(seen, scores.shape)
        p = np.where(seen, np.exp(scores), 0.0)
        p = p / p.sum(-1, keepdims=True)
        entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1).mean()
        found = values[f"decoder.blocks.{layer}.attention"]["attention"]
        assert found["logit_max"] == pytest.approx(np.abs(scores)[seen].max(), rel=1e-5)
        assert found["entropy"] == pytest.approx(entropy, rel=1e-5)
    log_z = np.log(np.exp(logits[0]).sum(-1)).mean()
    assert values["decoder.lm_head"]["output"]["log_z"] == pytest.approx(log_z, rel=1e-2)  # bf16 logits


@pytest.mark.parametrize("with_documents", [False, True])
@torch.no_grad()
def test_a_rule_for_flex_attention_has_the_figures_of_the_mask_in_memory(monkeypatch, with_documents):
    """On a CPU it has no backward pass, so the forward pass is measured alone."""
    torch.manual_seed(0)
    decoder = Decoder(replace(SHAPE, sliding_window=40))
    tokens = torch.randint(0, 20, (6, 160))
    numbers = documents(tokens, end_of_text=0) if with_documents else None
    found = []
    for mask in (attention.causal_mask, partial(block_mask, compiled=False)):
        monkeypatch.setattr(attention, "causal_mask", mask)
        tally = Tally(dict(p for n, m in decoder.named_modules() for p in decoder_places(n, m)), torch.device("cpu"))
        handles = [handle for name, part in decoder.named_modules() for handle in watch_decoder(name, part, tally)]
        decoder(tokens, documents_bt=numbers)
        found.append({name: roles["attention"] for name, roles in tally.read().items() if "attention" in roles})
        for handle in handles:
            handle.remove()
    in_memory, rule = found
    assert in_memory.keys() == {"blocks.0.attention", "blocks.1.attention"}
    for name, figures in in_memory.items():
        assert rule[name] == pytest.approx(figures, rel=1e-3)  # the layers below differ in their last bits
        assert figures["entropy"] > 0


def test_alignment_and_the_optimizers_figures_are_those_of_the_step(prepared, tmp_path):
    module = model(optimizer=health_tracked)
    monitor, readings = listening()
    trainer = fit(tmp_path, prepared, monitor, module=module, steps=2)
    health, values = trainer.optimizers[0].health_by_parameter(), readings[-1].values
    names = dict(module.named_parameters())
    assert {layer for layer, roles in values.items() if "update" in roles} == {n.rpartition(".")[0] for n in names}
    assert health.keys() == names.keys()
    for name, own in health.items():
        assert values[name.rpartition(".")[0]]["update"] == pytest.approx(
            {
                "update_rms": float(own.update_rms),
                "max_update": float(own.max_update),
                "stalled_updates": float(own.updates_lost),
                "moment_zeros": float(own.v_at_floor),
            }
        )
    mlp = module.decoder.blocks[1].mlp
    cosines = F.cosine_similarity(mlp.gate_proj.weight.double(), mlp.up_proj.weight.double()).abs()
    assert values["decoder.blocks.1.mlp"]["weight"]["swiglu_alignment"] == pytest.approx(float(cosines.max()))


def test_the_parameters_of_a_layer_are_measured_together():
    """The root mean square is over all their elements, and the largest update the largest of all."""
    torch.manual_seed(0)
    net = One(128, 128)
    net.layer.bias = torch.nn.Parameter(torch.zeros(128))
    kinds = ([("matrix", net.layer.weight)], [("vector", net.layer.bias)])
    for named in (kinds, [[p for _, p in group] for group in kinds]):
        groups = [{"params": group, "betas": (0.5 + 0.4 * i, 0.95)} for i, group in enumerate(named)]
        optimizer = FP8AdamW(groups, lr=1e-2, track_health=True)
        tally = Tally(dict(optimizer_places([optimizer], net)), torch.device("cpu"))
        measure_optimizer([optimizer], net, tally)
        assert tally.read() == {}  # not one step was taken
        for scale in (1.0, 5.0):
            net.layer(scale * torch.randn(64, 128)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        measure_optimizer([optimizer], net, tally)
        weight, bias = optimizer.health_by_parameter().values()
        squares = float(weight.update_rms) ** 2 * 128**2 + float(bias.update_rms) ** 2 * 128
        (found,) = (roles["update"] for roles in tally.read().values())
        assert found["update_rms"] == pytest.approx((squares / (128**2 + 128)) ** 0.5, rel=1e-6)
        assert found["max_update"] == max(float(weight.max_update), float(bias.max_update))


def test_an_optimizer_that_does_not_track_its_health_has_no_figures(prepared, tmp_path):
    monitor, readings = listening()
    fit(tmp_path, prepared, monitor, steps=1)
    assert all("update" not in roles for roles in readings[0].values.values())
