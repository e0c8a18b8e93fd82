"""`FP8Optimizer` from a configuration file: `FP8OptimizerOf`."""

import sys
from pathlib import Path

import pytest
import torch

from lightning_fp8.cli.main import main
from lightning_fp8.optim import FP8Optimizer, FP8OptimizerOf

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = """
model:
  config: {vocab_size: 272, hidden_size: 64, num_layers: 1, num_heads: 2, num_kv_heads: 2, intermediate_size: 64}
data: {path: DATA, sequence_length: 8, batch_size: 2}
fp8: {weights: bf16}
trainer:
  accelerator: cpu
  max_steps: 2
  limit_val_batches: 0
  log_every_n_steps: 1
  enable_model_summary: false
  enable_progress_bar: false
  default_root_dir: run
  callbacks: [{class_path: lightning_fp8.callbacks.LastCheckpoint}]
"""


def test_the_example_trains_and_resumes(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-fp8"])  # LightningCLI reads it, so the verb sets it
    Path("tiny.yaml").write_text(TINY.replace("DATA", str(prepared)))
    example = str(CONFIGS / "optimizer" / "fp8-nadam.yaml")
    main(["fit", "-c", "tiny.yaml", "-c", example, "--model.optimizer.seed", "7"])
    resume = ["--trainer.max_steps", "4", "--ckpt_path", "run/checkpoints/last.ckpt"]
    main(["fit", "-c", "tiny.yaml", "-c", example, "--model.optimizer.seed", "7", *resume])
    saved = torch.load("run/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]
    group = saved["param_groups"][0]
    assert {name: group[name] for name in ("betas", "decoupled_weight_decay", "moments", "seed")} == {
        "betas": (0.9, 0.95),
        "decoupled_weight_decay": True,
        "moments": "fp8",
        "seed": 7,
    }
    assert {int(state["step"]) for state in saved["state"].values()} == {4}
    matrix = saved["state"]["decoder.blocks.0.mlp.gate_proj.weight"]
    assert matrix["m_codes"].dtype is matrix["v_codes"].dtype is torch.uint8
    assert "mu_product" in matrix  # NAdam's own


def test_it_is_fp8_optimizer() -> None:
    p = torch.nn.Parameter(torch.ones(2, 64).bfloat16())
    options = {"block_size": 32, "rounding": "nearest", "seed": 3, "max_skipped_steps": 5}
    configured = FP8OptimizerOf([("w", p)], torch.optim.Adagrad, "fp32", **options)
    plain = FP8Optimizer(torch.optim.Adagrad([("w", p)]), "fp32", **options)
    assert type(configured.base) is torch.optim.Adagrad
    assert configured.state_dict() == plain.state_dict()
    assert type(FP8OptimizerOf([p]).base) is torch.optim.AdamW
