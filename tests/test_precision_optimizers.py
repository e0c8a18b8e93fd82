"""Several optimizers: a step of one ends the step of the layers that it trains, and of no others."""

import copy

import pytest
import torch
from lightning.fabric import Fabric
from small_models import Regression, batches, trainer
from torch import nn

from lightning_fp8 import FabricFP8Precision, FP8Precision
from lightning_fp8.compute import casts
from lightning_fp8.compute.gemm import record_gemms

DELAYED = {"preset": "delayed", "history": 16}


def weights(model):
    return torch.cat([p.detach().flatten().float() for p in model.parameters()])


def advances(net):
    """How often the scales of input, weight and grad_output advanced, by layer."""
    return [(layer.fp8_scales.history > 0).sum(1).tolist() for layer in net[::2]]


class Adversaries(Regression):
    """Two networks and two optimizers that take turns, as a GAN has them: the critic twice, the generator once."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def training_step(self, batch, batch_idx):
        generator, critic = self.optimizers()
        for optimizer, sign in ((critic, 1.0), (critic, 1.0), (generator, -1.0)):
            self.toggle_optimizer(optimizer)  # which freezes the other's parameters
            loss = sign * self.critic(self.net(batch["x"])).float().square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [torch.optim.AdamW(net.parameters(), lr=1e-2) for net in (self.net, self.critic)]


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_the_trainer_ends_the_step_of_what_an_optimizer_trains(tmp_path, recipe):
    torch.manual_seed(0)
    model, plugin = Adversaries(), FP8Precision(recipe)
    before = copy.deepcopy(model)
    trainer(tmp_path, plugin).fit(model, batches(4))
    for name in ("net", "critic"):
        assert not torch.equal(weights(getattr(model, name)), weights(getattr(before, name)))
    assert weights(model).isfinite().all()
    assert plugin.steps == 3 * 4
    if recipe == "delayed":
        assert advances(model.net) == [[4, 4, 4]] * 2
        assert advances(model.critic) == [[8, 8, 8]] * 2


class Game:
    """The same in a loop of Fabric's, by one plugin for both models or by one for each."""

    def __init__(self, *plugins):
        torch.manual_seed(0)
        self.plugins = plugins
        self.fabrics = [Fabric(accelerator="cpu", devices=1, plugins=[plugin]) for plugin in plugins]
        self.nets = [nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16))]
        self.nets += [nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))]
        optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-2) for net in self.nets]
        setups = (self.fabrics[0].setup, self.fabrics[-1].setup)
        pairs = [setup(*pair) for setup, *pair in zip(setups, self.nets, optimizers, strict=True)]
        (self.generator, self.critic), (self.generating, self.criticizing) = zip(*pairs, strict=True)

    def play(self, rounds):
        for i, batch in enumerate(batches(6)):
            if i not in rounds:
                continue
            for optimizer, sign in ((self.criticizing, 1), (self.criticizing, 1), (self.generating, -1)):
                loss = sign * self.critic(self.generator(batch["x"])).square().mean()
                for each in (self.generating, self.criticizing):
                    each.zero_grad()
                self.fabrics[0].backward(loss)
                optimizer.step()

    def state(self):
        parts = (self.generator, self.critic, self.generating, self.criticizing, *self.plugins)
        return copy.deepcopy([part.state_dict() for part in parts])

    def load(self, state):
        parts = (self.generator, self.critic, self.generating, self.criticizing, *self.plugins)
        for part, saved in zip(parts, state, strict=True):
            part.load_state_dict(saved)


def plugin(**options):
    return FabricFP8Precision(DELAYED, **options)


def test_two_models_of_one_plugin_train_as_with_one_each():
    together, apart = Game(plugin()), Game(plugin(), plugin())
    for game in (together, apart):
        game.play(range(4))
        assert [advances(net) for net in game.nets] == [[[4, 4, 4]] * 2, [[8, 8, 8]] * 2]
    for one, other in zip(together.nets, apart.nets, strict=True):
        assert torch.equal(weights(one), weights(other))
        for layer, twin in zip(one[::2], other[::2], strict=True):
            assert torch.equal(layer.fp8_scales.history, twin.fp8_scales.history)


def test_two_models_resume_bit_for_bit():
    through, first, again = Game(plugin()), Game(plugin()), Game(plugin())
    through.play(range(4))
    first.play(range(2))
    again.load(first.state())
    again.play(range(2, 4))
    for one, other in zip(through.nets, again.nets, strict=True):
        assert torch.equal(weights(one), weights(other))
        for layer, twin in zip(one[::2], other[::2], strict=True):
            assert torch.equal(layer.fp8_scales.scale, twin.fp8_scales.scale)


def test_a_cached_weight_lasts_until_its_own_optimizer_steps(monkeypatch):
    made, cast_matrix = [], casts.cast_matrix
    monkeypatch.setattr(casts, "cast_matrix", lambda x, *a, **k: made.append(tuple(x.shape)) or cast_matrix(x, *a, **k))
    game = Game(FabricFP8Precision(cache_weights=True))
    game.play(range(3))
    assert made.count((64, 32)) == 3  # the generator's first layer: once for three forward passes and their backward
    assert made.count((32, 16)) == 2 * 3 + 1  # the critic's: once more, after its last step


def test_layers_that_nobody_trains_go_along_with_the_model_they_are_in():
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[plugin()])
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16))
    net[0].requires_grad_(False)
    other = nn.Sequential(nn.Linear(32, 32))
    wrapped, optimizer = fabric.setup(net, torch.optim.SGD(net[2].parameters(), lr=0.1))
    unrelated, others = fabric.setup(other, torch.optim.SGD(other.parameters(), lr=0.1))
    for i, batch in enumerate(batches(6)):
        fabric.backward(wrapped(batch["x"]).square().mean() + unrelated(batch["x"]).square().mean())
        others.step()
        if i % 2:
            optimizer.step()
    assert advances(net) == [[3, 3, 0], [3, 3, 3]]  # nothing flows back through the first, frozen layer
    assert advances(other) == [[6, 6, 6]]


def test_a_layer_that_is_unfrozen_goes_along_with_its_new_optimizer():
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[plugin()])
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16))
    net[0].requires_grad_(False)
    wrapped, optimizer = fabric.setup(net, torch.optim.SGD(net[2].parameters(), lr=0.1))
    for i, batch in enumerate(batches(4)):
        if i == 2:
            net[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(net[0].parameters())})
        with record_gemms() as gemms:
            fabric.backward(wrapped(batch["x"]).square().mean())
        optimizer.step()
        assert len(gemms) == 2 + (1 if i < 2 else 3)
    assert advances(net) == [[4, 4, 2], [4, 4, 4]]
