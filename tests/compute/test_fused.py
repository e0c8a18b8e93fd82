"""Norms and MLPs that hand FP8 on: the same bits as without, fewer casts and less kept; on GPUs see `kernels/`."""

import copy
import dataclasses
import pickle

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F

from lightning_fp8 import convert_linears
from lightning_fp8.compute import PRESETS, casts, end_step, fp8_autocast, fuse_casts
from lightning_fp8.compute import fused as fusing
from lightning_fp8.compute.activations import keep_activations_in_fp8
from lightning_fp8.compute.fused import FusedMLP, FusedNorm
from lightning_fp8.compute.linear import fall_back
from lightning_fp8.models import Decoder, DecoderConfig

CONFIG = DecoderConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2)
FUSING = [name for name, recipe in PRESETS.items() if recipe.uses_fp8("weight_grad")]


def decoder(recipe="tensorwise", *, fused=True, recompute="none"):
    torch.manual_seed(0)
    model = Decoder(CONFIG, activation_checkpointing=recompute).bfloat16()
    for name, p in model.named_parameters():  # gains other than 1
        if name.endswith("norm.weight"):
            nn.init.normal_(p, 1.0, 0.2)
    convert_linears(model, recipe)
    if fused:
        fuse_casts(model)
    return model


def step(model, seed=0):
    """A loss and gradients, by name."""
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    end_step(model)
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def counting(monkeypatch):
    """The roles of casts that are made of a tensor in memory, as they happen."""
    roles = []
    plain = casts.cast

    def count(x, role, *args, **kwargs):
        roles.append(role)
        return plain(x, role, *args, **kwargs)

    monkeypatch.setattr(casts, "cast", count)
    return roles


@pytest.mark.parametrize("recipe", PRESETS)
def test_no_bit_changes(recipe):
    plain, fused = decoder(recipe, fused=False), decoder(recipe)
    for seed in range(3):
        (loss, grads), (fused_loss, fused_grads) = step(plain, seed), step(fused, seed)
        assert torch.equal(loss, fused_loss)
        for name, grad in grads.items():
            assert torch.equal(grad, fused_grads[name]), name
    for a, b in zip(plain.modules(), fused.modules(), strict=True):
        if getattr(a, "fp8_scales", None) is not None:
            assert torch.equal(a.fp8_scales.history, b.fp8_scales.history)
            assert (a.fp8_scales.history[:, :3] > 0).all()


@pytest.mark.parametrize("recipe", PRESETS)
def test_only_what_attention_makes_is_cast_afterwards(monkeypatch, recipe):
    """Of the four inputs of a block's layers one is no norm's and no activation's."""
    roles = counting(monkeypatch)
    for fused in (False, True):
        model = decoder(recipe, fused=fused)
        roles.clear()
        step(model)
        assert roles.count("input") == CONFIG.num_layers * (1 if fused and recipe in FUSING else 4)


def test_scales_that_processes_share_are_left_to_the_layers(monkeypatch):
    roles = counting(monkeypatch)
    step(decoder(dataclasses.replace(PRESETS["tensorwise"], sync_amax=True)))
    assert roles.count("input") == 4 * CONFIG.num_layers


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_activation_checkpointing_changes_no_bit(recipe, how):
    kept, again = decoder(recipe), decoder(recipe, recompute=how)
    for seed in range(2):
        (loss, grads), (other_loss, other_grads) = step(kept, seed), step(again, seed)
        assert torch.equal(loss, other_loss)
        assert all(torch.equal(grad, other_grads[name]) for name, grad in grads.items())
    for a, b in zip(kept.modules(), again.modules(), strict=True):
        if getattr(a, "fp8_scales", None) is not None:
            assert torch.equal(a.fp8_scales.history, b.fp8_scales.history)


@pytest.mark.parametrize("recipe", PRESETS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_casts_rows_alone_and_agrees(monkeypatch, recipe, mode):
    plain, fused = decoder(recipe, fused=False), decoder(recipe)
    for model in (plain, fused):
        step(model)  # for scales that are remembered
        model.eval()
    asked = []
    for name in ("gated_cast", "normed_cast"):
        real = getattr(fusing, name)
        monkeypatch.setattr(
            fusing,
            name,
            lambda *args, real=real, **how: asked.append((how["rows"], how["columns"])) or real(*args, **how),
        )
    tokens = torch.arange(32).view(2, 16)
    with mode():
        assert torch.equal(plain(tokens), fused(tokens))
    assert set(asked) == ({(True, False)} if recipe in FUSING else set())
    assert asked or recipe not in FUSING


def test_a_frozen_layer_asks_for_rows_alone():
    """And layers that share the norm's result, but are trained, find or make what they need."""
    results = []
    for fused in (False, True):
        model = decoder("blockwise", fused=fused)
        for block in model.blocks:
            block.attention.q_proj.weight.requires_grad_(False)
            block.mlp.down_proj.weight.requires_grad_(False)
        model(torch.arange(16)[None], torch.arange(16)[None]).backward()
        results.append([p.grad for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def kept_bytes(module, x):
    """Bytes that autograd keeps of activations for the backward of `module(x)`, each storage once."""
    storages = {}

    def note(t):
        if t.dim() > 1 and not isinstance(t, nn.Parameter):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = module(x)
    del y
    return sum(storages.values())


def test_an_mlp_keeps_less():
    x = torch.randn(4, 32, 64).bfloat16().requires_grad_()
    plain, fused = (decoder(fused=fused).blocks[0].mlp for fused in (False, True))
    saved = kept_bytes(plain, x) - kept_bytes(fused, x)
    assert saved == 2 * 4 * 32 * CONFIG.intermediate_size  # silu(gate), in bf16


def test_the_product_is_nan_to_whoever_else_reads_it():
    mlp = decoder().blocks[0].mlp
    seen = []
    mlp.down_proj.forward = lambda h, made: seen.append((h, made)) or F.linear(h, mlp.down_proj.weight)
    assert mlp(torch.randn(3, 64).bfloat16()).isnan().all()
    (h, made), *_ = seen
    assert h.isnan().all()
    assert h.untyped_storage().nbytes() == 2
    assert made.rows.codes.shape == (3, 128)


@pytest.mark.parametrize("way", ["hook", "pre-hook", "fallback", "autocast", "not converted"])
def test_modules_compute_as_ever_where_the_reader_wants_the_values(way):
    model = decoder()
    mlp, seen = model.blocks[0].mlp, []
    x = torch.randn(3, 64).bfloat16()
    if way == "hook":
        mlp.down_proj.register_forward_hook(lambda m, args, y: seen.extend(args))
    elif way == "pre-hook":
        mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.extend(args))
    elif way == "fallback":
        fall_back(model, ["blocks.0.mlp.down_proj"])
    elif way == "not converted":
        mlp = fuse_casts(m := Decoder(CONFIG).bfloat16()) and m.blocks[0].mlp
    with fp8_autocast(enabled=way != "autocast"):
        y = mlp(x)
        h = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        assert torch.equal(y, mlp.down_proj(h))
    assert y.isfinite().all()
    assert all(torch.equal(values, h) for values in seen)
    assert bool(seen) == ("hook" in way)


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_see_gradients_as_without(hook):
    seen = []
    for fused in (False, True):
        mlp = decoder(fused=fused).blocks[0].mlp
        getattr(mlp.down_proj, hook)(lambda module, *grads: seen.append([g for pair in grads for g in pair]))
        mlp(torch.ones(3, 64).bfloat16().requires_grad_()).sum().backward()
    plain, fused = seen
    assert plain
    assert all(torch.equal(a, b) for a, b in zip(plain, fused, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_without_an_eps_takes_torchs(dtype):
    """Where it counts: inputs whose squares are about as large."""
    model = nn.ModuleDict({"norm": nn.RMSNorm(64, eps=None), "reader": nn.Linear(64, 32)}).to(dtype)
    convert_linears(model, "tensorwise")
    fuse_casts(model, (), {"norm": "reader"})
    x = (torch.randn(5, 64) * 3e-4).to(dtype)
    expected = F.rms_norm(x, (64,), model["norm"].weight)
    assert torch.equal(model["norm"](x), expected)
    assert not torch.equal(expected, F.rms_norm(x, (64,), model["norm"].weight, 0.0))


def test_activations_kept_in_fp8_go_with_it():
    """The order does not matter, and each is undone on its own."""
    both, other = decoder(), decoder(fused=False)
    keep_activations_in_fp8(both, ["*mlp", "*_norm"])
    keep_activations_in_fp8(other, ["*mlp", "*_norm"])
    fuse_casts(other)
    (loss, grads), (other_loss, other_grads) = step(both), step(other)
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(grad, other_grads[name]) for name, grad in grads.items())
    exact_loss, exact = step(decoder())
    assert torch.equal(loss, exact_loss)
    assert any(not torch.equal(grad, exact[name]) for name, grad in grads.items())
    keep_activations_in_fp8(both, [])
    assert all(torch.equal(grad, exact[name]) for name, grad in step(both)[1].items())
    mlp = both.blocks[0].mlp
    assert isinstance(mlp, FusedMLP)
    fuse_casts(both, (), {})
    assert not any(isinstance(module, FusedMLP | FusedNorm) for module in both.modules())
    assert not any("fp8_reader" in module.__dict__ for module in both.modules())
    assert {type(m) for m in both.modules()} == {type(m) for m in decoder(fused=False).modules()}


def test_state_copies_and_pickles():
    model = decoder()
    assert list(model.state_dict()) == list(Decoder(CONFIG).state_dict())
    assert len(list(model.modules())) == len(list(Decoder(CONFIG).modules()))
    loss, _ = step(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin.blocks[0].mlp, FusedMLP)
        assert twin.blocks[1].mlp_norm.__dict__["fp8_reader"] is twin.blocks[1].mlp.gate_proj
        assert torch.equal(step(twin)[0], loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(dtype):
    """Residuals in fp32 sum three gradients in another order; the embedding's is where it shows, in the last bit."""
    results = []
    for fused in (False, True):
        model = decoder(fused=fused).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(step(model))
    (loss, grads), (fused_loss, fused_grads) = results
    assert torch.equal(loss, fused_loss)
    ours, theirs = fused_grads.pop("embedding.weight"), grads.pop("embedding.weight")
    assert (ours - theirs).abs().max() <= (2.0**-21 * theirs.abs().max() if dtype == torch.float32 else 0)
    assert all(torch.equal(grad, fused_grads[name]) for name, grad in grads.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_decides_for_norms_of_bf16(monkeypatch, dtype):
    """In which dtype depends on the device: on CUDA it is fp32, and what a norm then writes is not rounded."""
    calls = []
    real = fusing.normed_cast
    monkeypatch.setattr(fusing, "normed_cast", lambda x, *args, **how: calls.append(x.dtype) or real(x, *args, **how))
    block = decoder().blocks[0].to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        block.mlp_norm(torch.randn(4, 64, dtype=dtype))
    assert calls == ([torch.float32] if dtype == torch.float32 else [])


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
@pytest.mark.parametrize("by_operator", [False, True])
def test_an_mlp_compiles_to_one_graph(monkeypatch, recipe, by_operator):
    if by_operator:
        monkeypatch.setattr("lightning_fp8.kernels.fused._has_kernel", lambda x, tile: True)
    called = []

    def note(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes if "_cast" in str(node.target))
        return make_boxed_func(graph.forward)

    mlp, x = decoder(recipe).blocks[0].mlp, torch.randn(16, 64).bfloat16()
    torch._dynamo.reset()
    compiled = torch.compile(mlp, backend=aot_autograd(fw_compiler=note), fullgraph=True)
    results = []
    for run in (mlp, compiled):
        own = x.clone().requires_grad_()
        run(own).sum().backward()
        results.append([own.grad, *(p.grad for p in mlp.parameters())])
        mlp.zero_grad()
    assert called == ["lightning_fp8.gated_cast.default"] * by_operator
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_compiled_decoder_has_the_bits_of_eager():
    """Norms compute as ever there, for there is no table."""
    eager, compiled = decoder(), decoder()
    torch._dynamo.reset()
    for block in compiled.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for seed in range(2):
        (loss, grads), (other_loss, other_grads) = step(eager, seed), step(compiled, seed)
        assert torch.equal(loss, other_loss)
        assert all(torch.equal(grad, other_grads[name]) for name, grad in grads.items())


def test_mistakes_are_named():
    model = Decoder(CONFIG)
    with pytest.raises(ValueError, match=r"no module's name matches '\*mpl'"):
        fuse_casts(model, ("*mpl",))
    with pytest.raises(ValueError, match=r"'blocks\.0\.attention' is no down_proj"):
        fuse_casts(model, ("*attention",))
    with pytest.raises(ValueError, match=r"is a Linear, no torch\.nn\.RMSNorm"):
        fuse_casts(model, (), {"lm_head": "lm_head"})
    with pytest.raises(ValueError, match=r"no linear layer 'blocks\.0\.mlp\.gate' to read"):
        fuse_casts(model, (), {"*mlp_norm": "mlp.gate"})
    smooth = Decoder(DecoderConfig(smooth_swiglu=True))
    with pytest.raises(ValueError, match="smooths its product"):
        fuse_casts(smooth)
    model.blocks[1].mlp.act_fn = nn.GELU()  # as Gemma's, under the names of Llama's
    with pytest.raises(ValueError, match=r"'blocks\.1\.mlp' has a part 'act_fn', a GELU, which is no silu"):
        fuse_casts(model)
    assert not any(isinstance(module, FusedMLP | FusedNorm) for module in model.modules())  # not the first's, either
    model.blocks[1].mlp.act_fn = nn.SiLU()
    assert "blocks.1.mlp" in fuse_casts(model)
