"""The precision plugins over Transformer Engine's Python layer."""

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader
from transformer_engine_on_cpu import casts, gemms

from lightning_fp8 import FabricFP8Precision, FP8Precision
from lightning_fp8.compute import PRESETS, convert_to_transformer_engine
from lightning_fp8.optim import FP8AdamW

KEYS = ["net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias", "net.3.weight", "net.3.bias"]


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 16))
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch).float() - batch[:, :16].float()).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.net(1000 * batch)

    def configure_optimizers(self):
        return FP8AdamW(self.parameters(), lr=1e-2)


def batches(n=4):
    torch.manual_seed(3)
    return DataLoader(list(torch.randn(16 * n, 32)), batch_size=16)


def plugin(recipe="tensorwise", **options):
    return FP8Precision(recipe, backend="transformer_engine", weights="bf16", **options)


def fit(tmp_path, precision, *, model=None, ckpt_path=None, data=None, val=False, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet["enable_checkpointing"] = False
    trainer = Trainer(default_root_dir=tmp_path, plugins=[precision], **{"max_epochs": 1, **quiet, **options})
    model = model or Regression()
    trainer.fit(model, data or batches(), batches(1) if val else None, ckpt_path=ckpt_path, weights_only=True)
    return trainer, model


def fp8_gemms():
    return sum(gemm.fp8_operands == 2 for gemm in gemms)


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_a_model_that_knows_nothing_of_it_learns(te, tmp_path, recipe):
    _, model = fit(tmp_path, plugin(recipe), data=batches(40))
    assert fp8_gemms() == 40 * (3 + 2)
    assert model.losses[-1] < 0.6 * model.losses[0]
    assert list(model.state_dict()) == KEYS
    assert torch.get_default_dtype() is torch.float32


def test_losses_are_those_of_the_other_backends(te, tmp_path):
    losses = {}
    for backend in ("emulated", "transformer_engine"):
        _, model = fit(tmp_path, FP8Precision(backend=backend, weights="bf16"), data=batches(10))
        losses[backend] = torch.tensor(model.losses)
    torch.testing.assert_close(losses["transformer_engine"], losses["emulated"], rtol=0.01, atol=0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_resumes_bit_for_bit(te, tmp_path, accumulate):
    options = {"accumulate_grad_batches": accumulate, "data": batches(4)}
    _, through = fit(tmp_path, plugin("delayed"), max_epochs=2, **options)
    wanted = {name: tensor.clone() for name, tensor in through.net[3].scaling_tensors().items()}
    first, _ = fit(tmp_path, plugin("delayed"), **options)
    first.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == KEYS
    assert list(saved["FP8Precision"]["scales"][0]["layers"]) == ["net.0", "net.3"]
    _, again = fit(tmp_path, plugin("delayed"), max_epochs=2, ckpt_path=tmp_path / "x.ckpt", **options)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), through.parameters(), strict=True))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.net[3].scaling_tensors().items())
    del saved["FP8Precision"]
    torch.save(saved, tmp_path / "without.ckpt")
    _, without = fit(tmp_path, plugin("delayed"), max_epochs=2, ckpt_path=tmp_path / "without.ckpt", **options)
    assert not torch.equal(without.net[0].weight, through.net[0].weight)


def test_a_checkpoint_of_any_precision_loads_and_the_other_way_round(te, tmp_path):
    first, _ = fit(tmp_path, plugin())
    first.save_checkpoint(tmp_path / "te.ckpt")
    for precision in (FP8Precision(backend="emulated", weights="bf16"), plugin("delayed")):
        trainer, _ = fit(tmp_path, precision, max_epochs=2, ckpt_path=tmp_path / "te.ckpt")
        trainer.save_checkpoint(tmp_path / "other.ckpt")
        fit(tmp_path, plugin(), max_epochs=3, ckpt_path=tmp_path / "other.ckpt")


def test_evaluation_changes_no_scale_and_runs_as_asked(te, tmp_path):
    _, with_checks = fit(tmp_path, plugin("delayed"), val=True, num_sanity_val_steps=1, val_check_interval=2)
    evaluated = fp8_gemms()
    gemms.clear()
    _, without = fit(tmp_path, plugin("delayed"))
    assert evaluated == fp8_gemms() + 3 * 2  # three evaluations of two layers
    assert all(torch.equal(a, b) for a, b in zip(with_checks.parameters(), without.parameters(), strict=True))
    trained = fp8_gemms()
    gemms.clear()
    fit(tmp_path, plugin("delayed", eval_precision="bf16"), val=True, num_sanity_val_steps=1)
    assert fp8_gemms() == trained


def test_weights_are_cast_once_an_accumulation_window_where_asked(te, tmp_path):
    for cached, expected in ((False, 4), (True, 2)):
        casts.clear()
        fit(tmp_path, plugin(cache_weights=cached), accumulate_grad_batches=2)
        assert casts.count((64, 32)) == expected


def test_histories_stand_still_while_the_schedule_says_bf16(te, tmp_path):
    precision = plugin({"preset": "delayed", "history": 8}, bf16_last_steps=2)
    _, model = fit(tmp_path, precision)
    seen = model.net[0].scaling_tensors()["amax_history_fwd"][:, 0]
    assert (seen > 0).tolist() == [False] * 6 + [True] * 2  # of four steps, the newest last
    assert fp8_gemms() == 2 * (3 + 2)


def test_fabric_trains_the_same_way_with_an_optimizer_built_before(te):
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[FabricFP8Precision(backend="transformer_engine")])
    model = Regression().net
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[0].weight.detach().clone()
    wrapped, optimizer = fabric.setup(model, optimizer)
    fabric.backward(wrapped(torch.randn(16, 32)).square().mean())
    optimizer.step()
    assert isinstance(model[0], te.Linear)
    assert not torch.equal(model[0].weight, before)
    assert fp8_gemms() == 3 + 2


def test_a_model_may_be_converted_in_configure_model(te, tmp_path):
    class Early(Regression):
        def configure_model(self):
            convert_to_transformer_engine(self, "delayed")

    _, model = fit(tmp_path, plugin("delayed"), model=Early())
    assert fp8_gemms() == 4 * (3 + 2)
    assert isinstance(model.net[0], te.Linear)


def test_errors_of_the_recipe_come_before_anything_is_built():
    for preset in set(PRESETS) - {"tensorwise", "delayed", "blockwise", "mxfp8"}:
        with pytest.raises(ValueError, match="Transformer Engine has tensorwise"):
            FP8Precision(preset, backend="transformer_engine")


def test_a_model_without_a_convertible_layer_is_refused(te):
    with pytest.raises(ValueError, match=r"Linear has no linear layer that can run in FP8 \(: sizes 32 x 2"):
        plugin().convert_module(nn.Linear(32, 2))
