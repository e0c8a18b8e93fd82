"""A corrupted scale in a checkpoint: found when it is loaded, before the first step; see `test_fault_matrix.py`.

(The truncated shard, found when the data are opened, is in `tests/data/test_truncated.py`.)
"""

from unittest.mock import patch

import pytest
import torch
from faults import moments
from judge import Found, Outcome, Row, complaints, mutants
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from small_models import QUIET
from torch.utils.data import DataLoader, Subset
from trained_decoders import evaluate
from trials import BATCH, LENGTH, Setup, Toy, skips

from lightning_fp8 import FP8Precision
from lightning_fp8.data.synthetic import SyntheticBatches

SETUP = Setup(skips, steps=60, lr=1e-2, optimizer=moments)
SAVED_AT = 30
CORRUPTED_SCALE = Row(
    name="a corrupted scale in a checkpoint",
    onset=0,
    detector="refused when loaded",
    within=1,
    cure="an older checkpoint",
    test="stability/test_load_faults.py",
)
CHECKS = ("lightning_fp8.compute.state._check", "lightning_fp8.optim.state._possible")


class Steps(Callback):
    def __init__(self):
        self.taken = 0

    def on_before_optimizer_step(self, *args):
        self.taken += 1


def fit(folder, seed, resume=None):
    """Trains, from the start or from a checkpoint; the loss on held-out tokens, and the steps taken."""
    data = SyntheticBatches(skips(), SETUP.steps, BATCH, LENGTH, seed=seed)
    steps, module = Steps(), Toy(SETUP, seed)
    trainer = Trainer(
        max_steps=SETUP.steps,
        plugins=[FP8Precision("delayed", weights="bf16")],
        callbacks=[steps, ModelCheckpoint(folder, filename="{step}", every_n_train_steps=SAVED_AT, save_top_k=-1)],
        default_root_dir=folder,
        **QUIET,
    )
    rest = Subset(data, range(SAVED_AT if resume else 0, SETUP.steps))
    try:
        trainer.fit(module, DataLoader(rest, batch_size=None), ckpt_path=resume)
    except ValueError as error:
        return error, steps.taken
    return evaluate(module.decoder, skips()), steps.taken


def corrupt(saved, where):
    """Does harm to one scale of a checkpoint."""
    if where == "moments":
        scale = saved["optimizer_states"][0]["state"][4]["v_max"]
    else:
        scale = saved["FP8Precision"]["scales"][0]["layers"]["decoder.blocks.0.mlp.down_proj"]["scale"]
    scale.view(-1)[0] = float("nan")


@pytest.mark.slow
def test_a_corrupted_scale_is_found_before_the_first_step(tmp_path):
    clean, broken, cured = [], [], []
    for seed in range(3):
        folder = tmp_path / str(seed)
        clean.append(Outcome(fit(folder, seed)[0]))
        sound = folder / f"step={SAVED_AT}.ckpt"
        refused = []
        for where in ("moments", "casts"):
            saved = torch.load(sound, weights_only=True)
            corrupt(saved, where)
            torch.save(saved, folder / f"{where}.ckpt")
            error, steps = fit(folder / "refused", seed, folder / f"{where}.ckpt")
            assert isinstance(error, ValueError)
            assert "damaged" in str(error)
            refused.append(steps)
        with patch(CHECKS[0]), patch(CHECKS[1], return_value=True):
            loss = fit(folder / "broken", seed, folder / "moments.ckpt")[0]
        broken.append(Outcome(loss, max(refused)))
        loss, steps = fit(folder / "cured", seed, sound)
        assert steps == SETUP.steps - SAVED_AT
        cured.append(Outcome(loss))
    found = Found(clean, broken, cured)
    print(f"\n{found}")
    assert complaints(CORRUPTED_SCALE, found) == []
    for missing, mutant in mutants(CORRUPTED_SCALE, found):
        assert complaints(CORRUPTED_SCALE, mutant), missing
