"""What Lightning's own tests ask of its half, mixed, double, bitsandbytes and Transformer Engine plugins."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule
from small_models import Regression, batches, trainer
from torch import nn

from lightning_fp8 import FabricFP8Precision, FP8Linear, FP8Precision
from lightning_fp8.compute.gemm import record_gemms
from lightning_fp8.optim import FP8AdamW

OPTIMIZERS = {"fp32": torch.optim.AdamW, "bf16": FP8AdamW}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PLUGINS = [FP8Precision, FabricFP8Precision]


@pytest.mark.parametrize("weights", DTYPES)
def test_others_are_told_the_compute_dtype(weights):
    used = FP8Precision(weights=weights)
    assert used.precision == {"fp32": "bf16-mixed", "bf16": "bf16-true"}[weights]
    assert used.compute_dtype() is torch.bfloat16


@pytest.mark.parametrize("plugin", PLUGINS)
@pytest.mark.parametrize("weights", DTYPES)
def test_new_modules_and_tensors_have_the_dtype_of_the_weights(plugin, weights):
    used = plugin(weights=weights)
    for context in (used.module_init_context, used.tensor_init_context):
        with context():
            assert nn.Linear(2, 2).weight.dtype is torch.zeros(2).dtype is DTYPES[weights]
        assert torch.get_default_dtype() is torch.float32
        with pytest.raises(RuntimeError, match="boom"), context():
            raise RuntimeError("boom")
        assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("plugin", PLUGINS)
@pytest.mark.parametrize("weights", DTYPES)
def test_conversion_is_in_place_and_keeps_what_cannot_run_in_fp8(plugin, weights):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bare, self.ragged = nn.Linear(16, 48, bias=False), nn.Linear(1, 3)
            self.norm, self.lm_head = nn.LayerNorm(16), nn.Linear(16, 16)
            self.register_buffer("ids", torch.arange(3))

    model, used = Model(), plugin(weights=weights)
    parameters = dict(model.named_parameters())
    assert used.convert_module(model) is model
    assert used.convert_module(model) is model  # idempotent
    assert used.report.converted == ["bare"]
    assert list(used.report.kept) == ["ragged", "lm_head"]
    assert [type(m) for m in model.children()] == [FP8Linear, nn.Linear, nn.LayerNorm, nn.Linear]
    assert model.bare.bias is None
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert {p.dtype for p in model.parameters()} == {DTYPES[weights]}
    assert model.ids.dtype is torch.int64


@pytest.mark.parametrize("plugin", PLUGINS)
@pytest.mark.parametrize("weights", DTYPES)
def test_floating_inputs_and_outputs_are_converted_and_integers_left_alone(plugin, weights):
    used = plugin(weights=weights)
    data = {"x": torch.ones(2, dtype=torch.float64), "pair": (torch.ones(2).half(), torch.arange(2)), "name": "a"}
    data["mask"] = torch.ones(2, dtype=torch.bool)
    given = used.convert_input(data)
    assert (given["x"].dtype, given["pair"][0].dtype) == (DTYPES[weights],) * 2
    assert (given["pair"][1].dtype, given["mask"].dtype, given["name"]) == (torch.int64, torch.bool, "a")
    returned = used.convert_output(given)
    assert returned["x"].dtype is returned["pair"][0].dtype is torch.float32
    assert (returned["pair"][1].dtype, returned["mask"].dtype) == (torch.int64, torch.bool)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_the_forward_context_sets_the_compute_dtype(plugin):
    for weights, default, mixed in (("bf16", torch.bfloat16, False), ("fp32", torch.float32, True)):
        used = plugin(weights=weights)  # which `fabric.autocast()` may enter before there is a model
        with used.forward_context():
            assert torch.get_default_dtype() is default
            assert torch.is_autocast_enabled("cpu") is mixed
        assert (torch.get_default_dtype(), torch.is_autocast_enabled("cpu")) == (torch.float32, False)


@pytest.mark.parametrize("weights", DTYPES)
def test_a_model_built_in_configure_model_has_the_dtype_and_is_converted(tmp_path, weights):
    class Late(LightningModule):
        def configure_model(self):
            self.l = nn.Linear(16, 32)
            assert self.l.weight.dtype is DTYPES[weights]

        def test_step(self, *_): ...

    model = Late()
    trainer(tmp_path, FP8Precision(weights=weights)).test(model, [0], verbose=False)
    assert isinstance(model.l, FP8Linear)
    assert model.l.weight.dtype is DTYPES[weights]


def test_a_checkpoint_loads_into_a_model_that_was_made_empty(tmp_path):
    torch.save(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)).state_dict(), tmp_path / "weights.pt")
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[FabricFP8Precision("delayed", weights="bf16")])
    with fabric.init_module(empty_init=True):
        net = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
    wrapped = fabric.setup(net)
    fabric.load_raw(tmp_path / "weights.pt", wrapped)
    saved = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(torch.equal(value, saved[name].bfloat16()) for name, value in net.state_dict().items())
    assert wrapped(torch.ones(16, 16)).isfinite().all()


@pytest.mark.parametrize("weights", DTYPES)
def test_a_model_on_the_meta_device_is_set_up_and_takes_its_weights_from_a_file(tmp_path, weights):
    saved = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16)).to(DTYPES[weights])
    torch.save(saved.state_dict(), tmp_path / "weights.pt")
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[FabricFP8Precision("delayed", weights=weights)])
    with fabric.init_module(empty_init=False), torch.device("meta"):
        net = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16))
    wrapped = fabric.setup(net, move_to_device=False)
    assert {(p.device.type, p.dtype) for p in net.parameters()} == {("meta", DTYPES[weights])}
    assert isinstance(net[0], FP8Linear)
    state = torch.load(tmp_path / "weights.pt", mmap=True, weights_only=True)
    part = {name: value for name, value in state.items() if name.startswith("0.")}
    assert not wrapped.load_state_dict(part, strict=False, assign=True).unexpected_keys
    assert {p.device.type for p in net[1:].parameters()} == {"meta"}
    wrapped.load_state_dict(state, strict=True, assign=True)
    x, plain = torch.randn(16, 16), FabricFP8Precision("delayed", weights=weights)
    plain.convert_module(saved)
    with plain.forward_context():
        assert torch.equal(wrapped(x), saved(plain.convert_input(x)).float())


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_pass_without_gradients_does_not_cut_off_those_of_the_next(weights, off):
    used, model = FabricFP8Precision(weights=weights), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3))
    used.convert_module(model)
    x = torch.randn(16, 16, dtype=DTYPES[weights])
    with used.forward_context():
        with off():
            model(x)
        model(x).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("plugin", PLUGINS)
@pytest.mark.parametrize("weights", DTYPES)
def test_complex_buffers_stay_and_the_module_knows_its_dtype(plugin, weights):
    class Rotary(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(16, 16)
            self.net.register_buffer("angles", torch.polar(torch.ones(4), torch.arange(4.0)), persistent=False)
            self.register_buffer("steps", torch.ones(3))

    model, used = Rotary(), plugin(weights=weights)
    angles = model.net.angles
    used.convert_module(model)
    assert model.net.angles is angles
    assert list(model.state_dict()) == list(Rotary().state_dict())  # which has no buffer that is not persistent
    assert model.dtype is model.steps.dtype is DTYPES[weights]
    assert used.convert_input(angles) is used.convert_output(angles) is angles


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_a_plugin_and_a_model_go_through_pickle(tmp_path, recipe):
    """As `ddp_spawn` and `ddp_notebook` send them to the processes that they start."""
    models = []
    for used in (FP8Precision(recipe), pickle.loads(pickle.dumps(FP8Precision(recipe)))):
        torch.manual_seed(0)
        model = Regression()
        trainer(tmp_path, used).fit(model, batches())
        models.append(model.net)
    models += [pickle.loads(pickle.dumps(models[0])), copy.deepcopy(models[0])]
    x = torch.randn(16, 32, dtype=torch.bfloat16)
    ys = [net(x) for net in models]
    assert all(torch.equal(y, ys[0]) for y in ys)
    assert all(isinstance(net[0], FP8Linear) for net in models)


def test_a_fused_optimizer_trains_as_a_plain_one(tmp_path):
    weights = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = Regression(lambda parameters, lr, fused=fused: torch.optim.AdamW(parameters, lr, fused=fused))
        trainer(tmp_path, FP8Precision(), gradient_clip_val=1.0).fit(model, batches())
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_batches_that_a_training_step_skips_change_nothing(tmp_path):
    class Skips(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx % 2 == 0 else None

    torch.manual_seed(0)
    model = Skips(torch.optim.SGD)
    with record_gemms() as gemms:
        trainer(tmp_path, FP8Precision("delayed"), gradient_clip_val=0.5).fit(model, batches(4))
    assert len(gemms) == 2 * (3 + 2)
    assert all((layer.fp8_scales.history > 0).sum(1).tolist() == [2, 2, 2] for layer in model.net[::2])


def test_a_plugin_keeps_no_model_alive_that_it_set_up():
    """Fabric may set up one after the other, as in a search; each would take its memory along."""
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[plugin := FabricFP8Precision("delayed")])
    nets = [nn.Sequential(nn.Linear(16, 16)) for _ in range(2)]
    optimizers = [fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))[1] for net in nets]
    assert len(plugin.state_dict()["scales"]) == 2
    gone = [weakref.ref(nets.pop(0)), weakref.ref(optimizers.pop(0))]
    gc.collect()
    assert [thing() for thing in gone] == [None, None]
    assert len(plugin.state_dict()["scales"]) == 1
