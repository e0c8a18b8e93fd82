import warnings

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader

from lightning_fp8 import FabricFP8Precision, FP8Linear, FP8Precision
from lightning_fp8 import precision as plugins
from lightning_fp8.compute import PRESETS
from lightning_fp8.compute.gemm import record_gemms
from lightning_fp8.optim import FP8AdamW, enable_gradient_release

OPTIMIZERS = {"fp32": torch.optim.AdamW, "bf16": FP8AdamW}


class Regression(LightningModule):
    """A model that knows nothing of FP8; it notes what its steps see."""

    def __init__(self, optimizer=torch.optim.AdamW):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16))
        self.optimizer = optimizer
        self.seen = []

    def training_step(self, batch, batch_idx):
        y = self.net(batch["x"])
        self.seen.append((batch["x"].dtype, batch["id"].dtype, y.dtype, torch.get_default_dtype()))
        return (y.float() - batch["x"][:, :16].float()).square().mean()

    def validation_step(self, batch, batch_idx):
        self.net(batch["x"])

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=1e-2)


def batches(n=4):
    torch.manual_seed(3)
    return DataLoader([{"x": torch.randn(32), "id": torch.tensor(i)} for i in range(16 * n)], batch_size=16)


def trainer(tmp_path, plugin, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=tmp_path, plugins=[plugin], **{"max_epochs": 1, **quiet, **options})


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_model_that_knows_nothing_of_fp8_trains_in_it(tmp_path, weights):
    model = Regression(OPTIMIZERS[weights])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    with record_gemms() as gemms:
        trainer(tmp_path, FP8Precision(weights=weights), limit_val_batches=0).fit(model, batches())
    # two layers, four batches; forward, dw, and dx for all but the first layer
    assert len(gemms) == 4 * (3 + 2)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[weights]
    assert all(p.dtype is dtype for p in model.parameters())
    assert all(not torch.equal(p.float(), before[name].to(dtype).float()) for name, p in model.named_parameters())
    assert list(model.state_dict()) == keys
    assert set(model.seen) == {(dtype, torch.int64, torch.bfloat16, dtype)}
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("recipe", PRESETS)
def test_every_preset_learns_as_bf16_does(tmp_path, recipe):
    losses = {}
    for name, options in {"bf16": {"precision": "bf16-mixed"}, "fp8": {"plugins": [FP8Precision(recipe)]}}.items():
        torch.manual_seed(0)
        model = Regression()
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        Trainer(default_root_dir=tmp_path, max_epochs=1, limit_val_batches=0, **quiet, **options).fit(
            model, batches(40)
        )
        x = torch.randn(256, 32, generator=torch.Generator().manual_seed(9))
        losses[name] = (model.net(x) - x[:, :16]).square().mean().item()
    assert losses["bf16"] < 0.5  # of an initial 1.1
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.05)


@pytest.mark.parametrize(("eval_precision", "count"), [("fp8", 4 * 2), ("bf16", 0)])
def test_evaluation_runs_in_the_precision_that_was_asked_for(tmp_path, eval_precision, count):
    plugin = FP8Precision(eval_precision=eval_precision)
    with record_gemms() as gemms:
        trainer(tmp_path, plugin).validate(Regression(), batches(), verbose=False)
    assert len(gemms) == count


def test_global_state_is_restored_when_training_raises(tmp_path):
    class Failing(Regression):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        trainer(tmp_path, FP8Precision(weights="bf16"), limit_val_batches=0).fit(Failing(FP8AdamW), batches())
    assert torch.get_default_dtype() is torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_a_checkpoint_resumes_and_loads_in_any_precision(tmp_path):
    path = tmp_path / "x.ckpt"
    first = trainer(tmp_path, FP8Precision(weights="bf16"), limit_val_batches=0)
    first.fit(Regression(FP8AdamW), batches())
    first.save_checkpoint(path)
    again = trainer(tmp_path, FP8Precision(weights="bf16"), limit_val_batches=0, max_epochs=2)
    again.fit(Regression(FP8AdamW), batches(), ckpt_path=path, weights_only=True)
    assert again.global_step == 8
    state = torch.load(path, weights_only=True)["state_dict"]
    for precision in ("bf16-true", "32-true"):
        plain = Regression()
        plain.load_state_dict(state)  # strict: not a key more or less
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        Trainer(precision=precision, max_steps=1, enable_checkpointing=False, **options).fit(plain, batches())


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
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
    assert next(net.parameters()).dtype is {"fp32": torch.float32, "bf16": torch.bfloat16}[weights]


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


def test_rounding_bf16_weights_to_nearest_is_warned_about(tmp_path):
    with pytest.warns(UserWarning, match=r"AdamW rounds them to nearest.*FP8AdamW.*weights=\"fp32\""):
        trainer(tmp_path, FP8Precision(weights="bf16"), limit_val_batches=0).fit(Regression(), batches())


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_safe_combinations_are_not_warned_about(tmp_path, weights):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rounds them to nearest.*")
        trainer(tmp_path, FP8Precision(weights=weights), limit_val_batches=0).fit(
            Regression(OPTIMIZERS[weights]), batches()
        )


def test_an_optimizer_of_other_parameters_is_refused(tmp_path):
    stray = nn.Linear(2, 2)
    model = Regression(lambda parameters, lr: torch.optim.SGD(stray.parameters(), lr))
    with pytest.raises(ValueError, match="SGD holds parameters that are not the model's"):
        trainer(tmp_path, FP8Precision(), limit_val_batches=0).fit(model, batches())


class Released(Regression):
    """Gradient release, as a user enables it."""

    def configure_optimizers(self):
        optimizer = FP8AdamW(self.named_parameters(), lr=1e-2)
        enable_gradient_release(self, optimizer)
        return optimizer


class Plain(Regression):
    def configure_optimizers(self):
        return FP8AdamW(self.named_parameters(), lr=1e-2)


def test_gradient_release_trains_as_the_plain_step_does(tmp_path):
    weights = []
    for kind in (Plain, Released):
        torch.manual_seed(0)
        model = kind()
        trainer(tmp_path, FP8Precision(weights="bf16"), limit_val_batches=0).fit(model, batches())
        weights.append(model.state_dict())
        assert all((p.grad is None) is (kind is Released) for p in model.parameters())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_val": 1.0}, r"cannot clip gradients \(gradient_clip_val=1\.0\)"),
        ({"accumulate_grad_batches": 2}, r"cannot accumulate gradients \(accumulate_grad_batches=2\)"),
        ({"callbacks": [GradientAccumulationScheduler({3: 4})]}, r"\(accumulate_grad_batches=4\)"),
        ({"strategy": "ddp", "devices": 1}, "does not work with DistributedDataParallel"),
    ],
    ids=["clipping", "accumulation", "accumulation later", "ddp"],
)
def test_gradient_release_is_refused_where_it_cannot_work(tmp_path, options, message):
    model = Released()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, FP8Precision(weights="bf16"), limit_val_batches=0, **options).fit(model, batches())
    assert not model.seen  # before the first step


def test_a_model_without_a_convertible_layer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"BoringModel has no linear layer.*layer: sizes 32 x 2"):
        trainer(tmp_path, FP8Precision()).fit(BoringModel())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipe": "tensorwize"}, ("'tensorwize'", "'tensorwise'")),
        ({"backend": "cuda"}, ("'cuda'", "emulated")),
        ({"weights": "fp16"}, ("weights 'fp16'", "fp32, bf16")),
        ({"eval_precision": "fp32"}, ("eval_precision 'fp32'", "fp8, bf16")),
    ],
)
def test_a_wrong_argument_is_named(options, words):
    with pytest.raises(ValueError, match="FP8") as error:
        FP8Precision(**options)
    assert all(word in str(error.value) for word in words)


def test_precision_tells_others_the_compute_dtype():
    assert FP8Precision(weights="bf16").precision == "bf16-true"
    assert FP8Precision().precision == "bf16-mixed"


def test_a_model_without_linears_at_all_says_so():
    with pytest.raises(ValueError, match=r"it has no torch\.nn\.Linear"):
        FabricFP8Precision().convert_module(nn.Conv2d(3, 3, 3))


@pytest.fixture
def ended(monkeypatch):
    """The modules whose step was ended, in order."""
    modules, end_step = [], plugins.end_step
    monkeypatch.setattr(plugins, "end_step", lambda module: modules.append(module) or end_step(module))
    return modules


def histories(net):
    return [(layer.fp8_scales.history > 0).sum(1).tolist() for layer in net if isinstance(layer, FP8Linear)]


STEPPED = [[2, 2, 2], [2, 2, 2]]  # two layers; input, weight, grad_output: two steps of two micro-batches each


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_the_trainer_ends_a_step_once_an_accumulation_window(tmp_path, ended, weights):
    model = Regression(OPTIMIZERS[weights])
    plugin = FP8Precision("delayed", weights=weights, cache_weights=True)
    trainer(tmp_path, plugin, accumulate_grad_batches=2).fit(model, batches(4), batches(1))
    assert ended == [model, model]
    assert histories(model.net) == STEPPED


def test_fabric_ends_a_step_with_each_step_of_the_optimizer(ended):
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[FabricFP8Precision({"preset": "delayed", "history": 4})])
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16))
    wrapped, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=1e-2))
    for i, batch in enumerate(batches(4)):
        with fabric.no_backward_sync(wrapped, enabled=i % 2 == 0):
            fabric.backward(wrapped(batch["x"]).square().mean())
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert ended == [net, net]
    assert histories(net) == STEPPED


def test_recipes_that_remember_nothing_need_no_end_of_step(tmp_path, ended):
    trainer(tmp_path, FP8Precision(), limit_val_batches=0).fit(Regression(), batches())
    assert not ended


def test_the_trainer_can_keep_slow_layers_out(tmp_path):
    with pytest.raises(ValueError, match=r"32 x 64 are slower in FP8"):
        trainer(tmp_path, FP8Precision(keep_slow=True)).fit(Regression(), batches())
