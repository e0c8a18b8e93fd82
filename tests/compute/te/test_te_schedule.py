"""Schedule, evaluation and dtypes of the weights, as the plugin has them, under Transformer Engine's backend."""

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from phases import Gemms, phases
from small_models import Regression, batches, trainer
from torch import nn
from transformer_engine_on_cpu import gemms

from lightning_fp8 import FabricFP8Precision, FP8Precision
from lightning_fp8.optim import FP8AdamW

DELAYED = {"preset": "delayed", "history": 8}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def plugin(recipe=DELAYED, **options):
    return FP8Precision(recipe, backend="transformer_engine", **options)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"bf16_first_steps": 2}, "BBFFFF"),
        ({"bf16_last_steps": 1}, "FFFFFB"),
        ({"bf16_first_steps": 1, "bf16_last_steps": 3}, "BFFBBB"),
        ({"bf16_first_steps": 9}, "BBBBBB"),
    ],
    ids=str,
)
def test_the_schedule_counts_optimizer_steps(te, tmp_path, schedule, expected):
    counts, model = Gemms(), Regression(FP8AdamW)
    keys = list(model.state_dict())
    trainer(tmp_path, plugin(**schedule), callbacks=[counts]).fit(model, batches(6))
    assert phases(counts.training) == expected
    # As its kernels saw it: none of their operands was FP8 in a step in bf16.
    assert sum(gemm.fp8_operands == 2 for gemm in gemms) == expected.count("F") * (3 + 2)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_is_in_the_right_phase(te, tmp_path, stop):
    schedule = {"bf16_first_steps": 2, "bf16_last_steps": 2}
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, plugin(**schedule), callbacks=[saves], enable_checkpointing=True).fit(
        Regression(FP8AdamW), batches(6)
    )
    counts = Gemms()
    with pytest.warns(UserWarning, match="mid-epoch|not resumable|resuming"):
        trainer(tmp_path, plugin(**schedule), callbacks=[counts]).fit(
            Regression(FP8AdamW), batches(6), ckpt_path=tmp_path / f"step={stop}.ckpt"
        )
    assert phases(counts.training) == "BBFFBB"[stop:]


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
@pytest.mark.parametrize(("eval_precision", "expected"), [("fp8", "FF"), ("bf16", "BB")])
def test_evaluation_runs_in_the_precision_that_was_asked_for(te, tmp_path, verb, eval_precision, expected):
    counts = Gemms()
    used = trainer(tmp_path, plugin(eval_precision=eval_precision), callbacks=[counts], limit_val_batches=2)
    getattr(used, verb)(Regression(FP8AdamW), batches(2), **({} if verb == "predict" else {"verbose": False}))
    assert phases(counts.evaluation) == expected


def test_training_goes_on_in_fp8_after_an_evaluation_in_bf16(te, tmp_path):
    counts = Gemms()
    options = {"callbacks": [counts], "limit_val_batches": 1, "val_check_interval": 1}
    trainer(tmp_path, plugin(eval_precision="bf16", bf16_first_steps=1), **options).fit(
        Regression(FP8AdamW), batches(), batches()
    )
    assert phases(counts.training) == "BFFF"
    assert set(phases(counts.evaluation)) == {"B"}


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
@pytest.mark.parametrize("weights", DTYPES)
def test_weights_have_the_dtype_that_was_asked_for_and_learn(te, tmp_path, recipe, weights):
    losses = {}
    for backend in ("emulated", "transformer_engine"):
        torch.manual_seed(0)
        model = Regression(FP8AdamW)
        trainer(tmp_path, FP8Precision(recipe, backend=backend, weights=weights)).fit(model, batches(40))
        assert {p.dtype for p in model.parameters()} == {DTYPES[weights]}
        assert set(model.seen) == {(DTYPES[weights], torch.int64, torch.bfloat16, DTYPES[weights])}
        x = torch.randn(256, 32, generator=torch.Generator().manual_seed(9))
        losses[backend] = (model.float().net(x) - x[:, :16]).square().mean().item()
    assert losses["emulated"] < 0.5  # of an initial 1.1
    assert losses["transformer_engine"] == pytest.approx(losses["emulated"], rel=0.05)


def test_bf16_weights_are_warned_about_where_they_are_rounded_to_nearest(te, tmp_path):
    with pytest.warns(UserWarning, match="SGD rounds them to nearest"):
        trainer(tmp_path, plugin(weights="bf16")).fit(Regression(torch.optim.SGD), batches(1))


def test_the_schedule_of_fabric(te):
    schedule = {"bf16_first_steps": 1, "bf16_last_steps": 1, "total_steps": 3}
    fabric = Fabric(
        accelerator="cpu", devices=1, plugins=[FabricFP8Precision(backend="transformer_engine", **schedule)]
    )
    net = nn.Sequential(nn.Linear(32, 32))
    wrapped, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    counts = []
    for _ in range(3):
        before = sum(gemm.fp8_operands == 2 for gemm in gemms)
        fabric.backward(wrapped(torch.ones(16, 32)).sum())
        optimizer.step()
        counts.append(sum(gemm.fp8_operands == 2 for gemm in gemms) - before)
    assert phases(counts) == "BFB"
