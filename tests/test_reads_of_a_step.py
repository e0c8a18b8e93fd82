"""A training step, from the tokens to the new weights, does not wait for the device: its reads by the host are counted.

Twice, for each way of looking misses something. On a CPU reads go through the dispatcher, which counts them, but not
those that copy a tensor to the host, as `tolist` does: it is there already. On the meta device there is nothing to be
read, so whatever tries to is an error; the operators of the kernels and native GEMMs are called there, as on a GPU.
"""

import importlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fp8 import convert_linears
from lightning_fp8.compute import PRESETS, FP8Linear, end_step, fuse_casts
from lightning_fp8.models import Decoder, DecoderConfig
from lightning_fp8.optim import FP8AdamW, decay_groups, finite

CONFIG = DecoderConfig(vocab_size=64, hidden_size=128, intermediate_size=256, num_layers=2, num_heads=4, num_kv_heads=4)
WITH_FUSED_KERNELS = ("tensorwise", "delayed", "blockwise", "mxfp8")
READS = {"aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.equal", "aten.is_nonzero", "aten.masked_select"}


class Operations(TorchDispatchMode):
    """Lists what reaches the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))

    def reads(self):
        return [name for name in self.names if name in READS]


def training(recipe, *, fused, device="cpu", recompute="none"):
    """A model, its optimizer and a step of both."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Decoder(CONFIG, activation_checkpointing=recompute).bfloat16()
        tokens = torch.zeros(2, 17, dtype=torch.int64)
    convert_linears(model, recipe)
    if fused:
        fuse_casts(model)
    optimizer = FP8AdamW(decay_groups(model), lr=1e-3)

    def step():
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        end_step(model)
        return loss

    return model, step


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("recipe", PRESETS)
def test_a_step_has_no_host_read(monkeypatch, recipe, fused, recompute):
    monkeypatch.setattr(finite, "_FREE_TO_READ", ())  # as if the CPU were a device, which is not free to read
    _, step = training(recipe, fused=fused, recompute=recompute)
    step()
    with Operations() as operations:
        loss = step()
    assert operations.reads() == []
    assert len(operations.names) > 500  # it was looked at
    with operations:
        assert loss.item() > 0
    assert len(operations.reads()) == 1  # and a read would have been seen


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("recipe", PRESETS)
def test_a_step_needs_no_value_of_any_tensor(monkeypatch, recipe, fused):
    for module in map(importlib.import_module, ("lightning_fp8.kernels.cast", "lightning_fp8.kernels.fused")):
        monkeypatch.setattr(module, "_has_kernel", lambda x, tile, module=module: tile in module._TILES_WITH_KERNELS)
    model, step = training(recipe, fused=fused, device="meta")
    for layer in model.modules():
        if isinstance(layer, FP8Linear):
            layer.fp8_backend = "native"
    with Operations() as operations:
        step()
        loss = step()
    fusing = (
        {"lightning_fp8.gated_cast", "lightning_fp8.normed_cast"} if fused and recipe in WITH_FUSED_KERNELS else set()
    )
    assert {"lightning_fp8.cast", *fusing} <= set(operations.names)
    assert any("scaled_mm" in name for name in operations.names)
    for read in (loss.item, loss.tolist, lambda: bool(loss)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()
