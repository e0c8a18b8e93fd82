"""What ran in FP8, told by Transformer Engine's layers: to `record_gemms`, and so to the report of a run."""

import json

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_fp8 import FP8Precision, convert_linears, fp8_autocast
from lightning_fp8.callbacks import RunReport
from lightning_fp8.compute import convert_to_transformer_engine, transformer_engine_autocast
from lightning_fp8.compute.gemm import record_gemms
from lightning_fp8.data import TokenDataModule
from lightning_fp8.models import DecoderConfig, DecoderLM

SHAPE = DecoderConfig(vocab_size=272, hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=2, intermediate_size=96)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 48, bias=False))


def recorded(net, recipe, x):
    """What one pass noted, without the backend, which is returned apart."""
    with record_gemms() as gemms:
        with transformer_engine_autocast(recipe):
            y = net(x)
        if y.requires_grad:
            y.float().square().sum().backward()
    return sorted(str(gemm[:-1]) for gemm in gemms), {gemm.backend for gemm in gemms}


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
@pytest.mark.parametrize("frozen", [None, 0, 2])
@pytest.mark.parametrize("wants_dx", [False, True])
def test_its_gemms_are_those_of_the_other_backends(te, recipe, frozen, wants_dx):
    ours, theirs = model(), model()
    for net in (ours, theirs):
        if frozen is not None:
            net[frozen].requires_grad_(False)
    convert_linears(ours, recipe, backend="emulated")
    convert_to_transformer_engine(theirs, recipe)
    x = torch.randn(32, 32, requires_grad=wants_dx)
    (expected, _), (found, backends) = recorded(ours, recipe, x), recorded(theirs, recipe, x)
    assert found == expected
    assert len(found) == 6 - (frozen is not None) - (not wants_dx) - (frozen == 0 and not wants_dx)
    assert backends == {"transformer_engine"}


def test_what_ran_in_high_precision_is_not_noted(te):
    net, x = model(), torch.randn(16, 32)
    convert_to_transformer_engine(net)
    with record_gemms() as gemms:
        net(x).sum().backward()  # outside of Transformer Engine's autocast
        with transformer_engine_autocast(), fp8_autocast(enabled=False):
            net(x).sum().backward()
        with transformer_engine_autocast(enabled=False):
            net(x).sum().backward()
    assert gemms == []


def test_padded_tokens_count_as_they_are_multiplied(te):
    net = model()
    convert_to_transformer_engine(net)
    with torch.no_grad():
        found, _ = recorded(net, "tensorwise", torch.randn(3, 32))
    assert len(found) == 2
    assert all(gemm.startswith("(16, ") for gemm in found)


def test_the_report_counts_layers_and_flops_as_under_the_other_backends(te, prepared, tmp_path):
    summaries = []
    for backend in ("emulated", "transformer_engine"):
        torch.manual_seed(0)
        trainer = Trainer(
            accelerator="cpu",
            plugins=[FP8Precision(backend=backend, weights="bf16")],
            default_root_dir=tmp_path / backend,
            callbacks=[RunReport()],
            max_steps=2,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(DecoderLM(SHAPE), datamodule=TokenDataModule(str(prepared), sequence_length=8, batch_size=2))
        summaries.append(json.loads((tmp_path / backend / "summary.json").read_text()))
    assert [summary["fp8/linears"] for summary in summaries] == [7 * 2] * 2
    assert 0.5 < summaries[0]["fp8/flop_share"] < 0.95  # the head is not in FP8
    assert summaries[1]["fp8/flop_share"] == summaries[0]["fp8/flop_share"]
