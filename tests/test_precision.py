"""The plugin in the Trainer and in Fabric: training, checkpoints, and what they leave behind."""

import logging

import pytest
import torch
from lightning.fabric import Fabric
from small_models import Regression, batches, trainer
from torch import nn

from lightning_fp8 import FabricFP8Precision, FP8Linear, FP8Precision
from lightning_fp8.compute import PRESETS
from lightning_fp8.compute.autocast import fp8_enabled, scales_frozen
from lightning_fp8.compute.gemm import record_gemms
from lightning_fp8.optim import FP8AdamW

OPTIMIZERS = {"fp32": torch.optim.AdamW, "bf16": FP8AdamW}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("weights", DTYPES)
def test_a_model_that_knows_nothing_of_fp8_trains_in_it(tmp_path, weights):
    model = Regression(OPTIMIZERS[weights])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    with record_gemms() as gemms:
        trainer(tmp_path, FP8Precision(weights=weights)).fit(model, batches())
    # two layers, four batches; forward, dw, and dx for all but the first layer
    assert len(gemms) == 4 * (3 + 2)
    dtype = DTYPES[weights]
    assert all(p.dtype is dtype for p in model.parameters())
    assert all(not torch.equal(p.float(), before[name].to(dtype).float()) for name, p in model.named_parameters())
    assert list(model.state_dict()) == keys
    assert set(model.seen) == {(dtype, torch.int64, torch.bfloat16, dtype)}
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("recipe", PRESETS)
def test_every_preset_learns_as_bf16_does(tmp_path, recipe):
    losses = {}
    for name, plugins, options in (("bf16", [], {"precision": "bf16-mixed"}), ("fp8", [FP8Precision(recipe)], {})):
        torch.manual_seed(0)
        model = Regression()
        trainer(tmp_path, *plugins, **options).fit(model, batches(40))
        x = torch.randn(256, 32, generator=torch.Generator().manual_seed(9))
        losses[name] = (model.net(x) - x[:, :16]).square().mean().item()
    assert losses["bf16"] < 0.5  # of an initial 1.1
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.05)


def global_state():
    return (
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        fp8_enabled(),
        scales_frozen(),
    )


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("stage", ["configure_model", "training_step", "validation_step", "test_step", "predict_step"])
def test_global_state_is_restored_when_a_step_raises(tmp_path, weights, stage):
    def fail(*_):
        changed = (weights, stage) != ("fp32", "configure_model")  # new modules are fp32 as it is
        assert (global_state() != before) == changed
        raise RuntimeError("boom")

    verbs = {"validation_step": "validate", "test_step": "test", "predict_step": "predict"}
    before, model = global_state(), Regression(OPTIMIZERS[weights])
    setattr(model, stage, fail)
    plugin = FP8Precision(weights=weights, eval_precision="bf16")
    used = trainer(tmp_path, plugin, limit_val_batches=1, num_sanity_val_steps=0)
    with pytest.raises(RuntimeError, match="boom"):
        getattr(used, verbs.get(stage, "fit"))(model, batches())
    assert global_state() == before


@pytest.mark.parametrize("weights", DTYPES)
def test_global_state_is_restored_when_a_forward_of_fabric_raises(weights):
    class Failing(nn.Linear):
        def forward(self, x):
            assert global_state() != before
            raise RuntimeError("boom")

    before = global_state()
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[FabricFP8Precision(weights=weights)])
    net = fabric.setup(nn.Sequential(nn.Linear(16, 16), Failing(16, 16)))
    with pytest.raises(RuntimeError, match="boom"):
        net(torch.ones(16, 16))
    assert global_state() == before


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
@pytest.mark.parametrize("weights", DTYPES)
def test_a_checkpoint_resumes_in_any_precision_and_loads_in_plain_torch(tmp_path, weights, recipe):
    path = tmp_path / "x.ckpt"
    first = trainer(tmp_path, FP8Precision(recipe, weights=weights), enable_checkpointing=True)
    first.fit(Regression(OPTIMIZERS[weights]), batches())
    first.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    plain = nn.Module()
    plain.net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16))
    plain.load_state_dict(state, strict=True)  # not a key more or less
    for plugins, options in (
        ([FP8Precision(recipe, weights=weights)], {}),
        ([], {"precision": "bf16-true"}),
        ([], {"precision": "32-true"}),
    ):
        again = trainer(tmp_path, *plugins, max_epochs=2, **options)
        model = Regression(OPTIMIZERS[weights])
        again.fit(model, batches(), ckpt_path=path, weights_only=True)
        assert again.global_step == 8
        assert list(model.state_dict()) == list(state)


def test_a_bf16_checkpoint_resumes_in_fp8_and_says_what_is_calibrated(tmp_path, caplog):
    path = tmp_path / "bf16.ckpt"
    first = trainer(tmp_path, precision="bf16-mixed", enable_checkpointing=True)
    first.fit(Regression(), batches())
    first.save_checkpoint(path)
    for recipe, told in (("tensorwise", []), ("delayed", ["FP8: 2 of 2 FP8 layers (net.0, net.2) calibrate"])):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            again = trainer(tmp_path, FP8Precision(recipe), max_epochs=2)
            again.fit(Regression(), batches(), ckpt_path=path)
        assert again.global_step == 8
        said = [record.message for record in caplog.records if "calibrate" in record.message]
        assert [line.split(" their")[0] for line in said] == told


def test_an_evaluation_uses_the_scales_of_the_checkpoint(tmp_path):
    trained, path = FP8Precision("delayed"), tmp_path / "x.ckpt"
    first = trainer(tmp_path, trained, enable_checkpointing=True)
    first.fit(Regression(), batches())
    first.save_checkpoint(path)
    evaluated = FP8Precision("delayed")
    trainer(tmp_path, evaluated, limit_val_batches=1).validate(Regression(), batches(), ckpt_path=path, verbose=False)
    for name, layer in trained.state_dict()["scales"][0]["layers"].items():
        assert torch.equal(layer["scale"], evaluated.state_dict()["scales"][0]["layers"][name]["scale"])


@pytest.mark.parametrize("weights", DTYPES)
def test_fabric_trains_the_same_way(weights):
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[FabricFP8Precision(weights=weights)])
    with fabric.init_module():
        net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16))
    optimizer = OPTIMIZERS[weights](net.parameters(), lr=1e-2)
    net, optimizer = fabric.setup(net, optimizer)
    losses = []
    with record_gemms() as gemms:
        for batch in fabric.setup_dataloaders(batches(20)):
            optimizer.zero_grad()
            y = net(batch["x"])
            assert y.dtype is torch.float32  # outputs have the default dtype
            loss = (y - batch["x"][:, :16].float()).square().mean()
            fabric.backward(loss)
            optimizer.step()
            losses.append(loss.item())
    assert len(gemms) == 20 * (3 + 2)
    assert losses[-1] < 0.8 * losses[0]
    assert next(net.parameters()).dtype is DTYPES[weights]


def test_the_setup_of_fabric_leaves_an_earlier_optimizer_in_charge():
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[FabricFP8Precision()])
    net = nn.Sequential(nn.Linear(32, 32))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    before = net[0].weight.detach().clone()
    wrapped, optimizer = fabric.setup(net, optimizer)
    fabric.backward(wrapped(torch.randn(16, 32)).sum())
    optimizer.step()
    assert isinstance(net[0], FP8Linear)
    assert not torch.equal(net[0].weight, before)


def test_precision_tells_others_the_compute_dtype():
    assert FP8Precision(weights="bf16").precision == "bf16-true"
    assert FP8Precision().precision == "bf16-mixed"
