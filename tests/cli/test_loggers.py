"""Loggers by class path: they get the figures, and the folder of the run stays whole, so that it can be resumed."""

import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from hostile.world import CKPT, make

from lightning_fp8.cli.main import main


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains in the folder `run` with a logger and further options, in a working folder that has everything."""
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-fp8"])

    def call(logger, *options, **arguments):
        content = {"class_path": f"lightning.pytorch.loggers.{logger}", "init_args": arguments}
        Path("logger.yaml").write_text(yaml.safe_dump({"trainer": {"logger": content}}))
        main(["fit", "-c", "config.yaml", "-c", "logger.yaml", *options])

    return call


@pytest.mark.parametrize("logger", ["CSVLogger", "TensorBoardLogger"])
def test_the_run_is_where_it_is_looked_for(logger, train, capsys):
    """Lightning keeps checkpoints and configuration where the logger writes, and looks for them elsewhere."""
    train(logger, save_dir="elsewhere")
    assert torch.load(CKPT, weights_only=True)["global_step"] == 2
    assert f"lightning.pytorch.loggers.{logger}" in Path("run/config.yaml").read_text()
    assert not [path for path in Path("elsewhere").rglob("*") if path.name in ("checkpoints", "config.yaml")]
    train(logger, "--ckpt_path=last", "--trainer.max_steps=3", save_dir="elsewhere")
    assert torch.load(CKPT, weights_only=True)["global_step"] == 3


def test_weights_and_biases_offline(train):
    import wandb

    train("WandbLogger", offline=True, save_dir="logs")
    wandb.finish()
    (run,) = Path("logs").rglob("*.wandb")
    # A process of its own writes the file, now and then a moment after `finish` returns.
    give_up = time.monotonic() + 60
    while b"train/loss" not in run.read_bytes():
        assert time.monotonic() < give_up, f"{run} has no loss after a minute: {run.read_bytes()[:200]!r}"
        time.sleep(0.1)
    assert Path(CKPT).exists()


def test_mlflow_without_a_server(train):
    from mlflow import MlflowClient

    train("MLFlowLogger", tracking_uri="sqlite:///mlflow.db")
    client = MlflowClient("sqlite:///mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("lightning_logs").experiment_id])
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 2
    assert Path(CKPT).exists()
