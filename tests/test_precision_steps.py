"""What ends an optimizer step: the scales advance once, and gradients that are released in backward do as well."""

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from small_models import Regression, batches, trainer
from torch import nn

from lightning_fp8 import FabricFP8Precision, FP8Linear, FP8Precision
from lightning_fp8 import precision as plugins
from lightning_fp8.optim import FP8AdamW, enable_gradient_release

OPTIMIZERS = {"fp32": torch.optim.AdamW, "bf16": FP8AdamW}


@pytest.fixture
def no_group_stays():
    """A strategy of Lightning's keeps its process group for the process, and scales would be reduced over it."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def ended(monkeypatch):
    """The layers whose step was ended, in order, a list for each step."""
    steps, end_step_of = [], plugins.end_step_of

    def end(layers):
        steps.append(list(layers))
        end_step_of(steps[-1])

    monkeypatch.setattr(plugins, "end_step_of", end)
    return steps


def histories(net):
    return [(layer.fp8_scales.history > 0).sum(1).tolist() for layer in net if isinstance(layer, FP8Linear)]


STEPPED = [[2, 2, 2], [2, 2, 2]]  # two layers; input, weight, grad_output: two steps of two micro-batches each


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_the_trainer_ends_a_step_once_an_accumulation_window(tmp_path, ended, weights):
    model = Regression(OPTIMIZERS[weights])
    plugin = FP8Precision("delayed", weights=weights, cache_weights=True)
    trainer(tmp_path, plugin, accumulate_grad_batches=2, limit_val_batches=1).fit(model, batches(4), batches(1))
    assert ended == 2 * [[model.net[0], model.net[2]]]
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
    assert ended == 2 * [[net[0], net[2]]]
    assert histories(net) == STEPPED


def test_recipes_that_remember_nothing_need_no_end_of_step(tmp_path, ended):
    trainer(tmp_path, FP8Precision()).fit(Regression(), batches())
    assert not ended


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
        trainer(tmp_path, FP8Precision(weights="bf16")).fit(model, batches())
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
@pytest.mark.usefixtures("no_group_stays")
def test_gradient_release_is_refused_where_it_cannot_work(tmp_path, options, message):
    model = Released()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, FP8Precision(weights="bf16"), **options).fit(model, batches())
    assert not model.seen  # before the first step
