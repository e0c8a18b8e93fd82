"""The plugin in other people's models and command lines, with no code of theirs changed."""

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.demos.transformer import LightningTransformer
from small_models import Regression, batches, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fp8 import FP8Linear, FP8Precision, Recipe
from lightning_fp8.compute import Operand
from lightning_fp8.compute.gemm import record_gemms

PATH = "lightning_fp8.FP8Precision"
DELAYED = Recipe(scaling="delayed")
NESTED = Recipe(weight=Operand(power_of_two=True), scaling="delayed", history=4)


class Batches(LightningDataModule):
    def train_dataloader(self):
        return batches()


def command_line(tmp_path, *args, config=None):
    """Lightning's own CLI, which knows nothing of this library; returns the plugin of its trainer."""
    options = [
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.max_steps=2",
        "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.enable_checkpointing=false",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    if config:
        (tmp_path / "config.yaml").write_text(config)
        options += ["--config", str(tmp_path / "config.yaml")]
    cli = LightningCLI(
        Regression, Batches, args=["fit", *options, *args], save_config_callback=None, auto_configure_optimizers=False
    )
    return cli.trainer.precision_plugin, cli.model


@pytest.mark.parametrize(
    ("args", "config", "recipe"),
    [
        ([f"--trainer.plugins={PATH}"], None, Recipe()),
        (["--trainer.plugins=FP8Precision"], None, Recipe()),
        ([f"--trainer.plugins={PATH}", "--trainer.plugins.recipe=delayed"], None, DELAYED),
        ([f"--trainer.plugins+={PATH}"], None, Recipe()),
        ([f'--trainer.plugins=[{{"class_path": "{PATH}"}}]'], None, Recipe()),
        ([], f"trainer: {{plugins: {PATH}}}", Recipe()),
        (
            [],
            f"trainer: {{plugins: [{{class_path: {PATH}, init_args: {{recipe: delayed}}}}]}}",
            Recipe(scaling="delayed"),
        ),
        (
            [],
            f"""
trainer:
  plugins:
    - class_path: {PATH}
      init_args:
        weights: fp32
        recipe: {{scaling: delayed, history: 4, weight: {{power_of_two: true}}}}
""",
            NESTED,
        ),
    ],
    ids=["class path", "short name", "argument", "+=", "list", "YAML", "YAML list", "YAML nested"],
)
def test_the_plugin_comes_from_a_command_line_or_yaml(tmp_path, args, config, recipe):
    with record_gemms() as gemms:
        plugin, model = command_line(tmp_path, *args, config=config)
    assert isinstance(plugin, FP8Precision)
    assert plugin.recipe == recipe
    assert isinstance(model.net[0], FP8Linear)
    assert len(gemms) == 2 * (3 + 2)


def test_the_boring_model_trains(tmp_path):
    model = BoringModel()
    model.layer = nn.Linear(32, 32)  # hardware multiplies sizes of multiples of 16
    before = model.layer.weight.detach().clone()
    with record_gemms() as gemms:
        used = trainer(tmp_path, FP8Precision(), limit_train_batches=3, limit_val_batches=2, limit_test_batches=2)
        used.fit(model)
        used.test(model, verbose=False)
    assert len(gemms) > 3 * 2
    assert not torch.equal(model.layer.weight, before)


class Words(LightningDataModule):
    """Cyclic words for a demo that would download a text."""

    def train_dataloader(self):
        words = torch.arange(64 * 9).remainder(48).view(64, 9)
        return DataLoader(TensorDataset(words[:, :-1], words[:, 1:]), batch_size=4)


def test_the_transformer_of_lightning_s_demos_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(LightningTransformer, "prepare_data", lambda self: None)  # which downloads
    torch.manual_seed(0)
    model = LightningTransformer(vocab_size=48)
    with pytest.raises(ValueError, match=r"no linear layer that can run in FP8.*200 x 200 are not multiples of 16"):
        trainer(tmp_path, FP8Precision()).fit(model, Words())
    model.model = type(model.model)(vocab_size=48, ninp=64, nhid=128, dropout=0.0)
    losses, step = [], model.training_step

    def training_step(*args):
        losses.append(step(*args))
        return losses[-1]

    model.training_step = training_step
    with record_gemms() as gemms:
        trainer(tmp_path, FP8Precision()).fit(model, Words())
    converted = [name for name, module in model.named_modules() if isinstance(module, FP8Linear)]
    assert len(converted) == 2 * 4 + 1  # two linear layers in each of four blocks, and the head
    assert len(gemms) == 3 * len(converted) * len(losses) == 3 * 9 * 16
    assert losses[-1] < 0.8 * losses[0]
