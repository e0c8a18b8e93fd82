"""C8 of the protocol in `docs/stability.md`: 20 steps, a checkpoint, 20 steps are 40 steps, bit for bit.

Under delayed scaling, monitored and guarded. Not so if the checkpoint loses the amaxes that scales follow from: what
the comparison sees when it is not there.
"""

import pytest
import torch
from faults import moments
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from small_models import QUIET
from torch.utils.data import DataLoader, Subset
from trials import BATCH, LENGTH, REWIND, SPIKES, Setup, Toy, skips

from lightning_fp8 import FP8Precision
from lightning_fp8.callbacks import FP8Guard, FP8Monitor
from lightning_fp8.data.synthetic import SyntheticBatches

SETUP = Setup(skips, steps=40, lr=1e-2, optimizer=moments)
HALF = 20


def fit(folder, seed, resume=None):
    """Trains, from the start or from a checkpoint: every tensor that is left, and the readings of the second half."""
    readings, monitor = {}, FP8Monitor(every_n_steps=5)
    monitor.listeners.append(lambda _, reading: readings.update({reading.step: reading.values}))
    data = SyntheticBatches(skips(), SETUP.steps, BATCH, LENGTH, seed=seed)
    module = Toy(SETUP, seed)
    trainer = Trainer(
        max_steps=SETUP.steps,
        plugins=[FP8Precision("delayed", weights="bf16")],
        callbacks=[
            monitor,
            FP8Guard(spikes=SPIKES, rewind=REWIND),
            ModelCheckpoint(folder, filename="{step}", every_n_train_steps=HALF, save_top_k=-1),
        ],
        default_root_dir=folder,
        **QUIET,
    )
    rest = Subset(data, range(HALF if resume else 0, SETUP.steps))
    trainer.fit(module, DataLoader(rest, batch_size=None), ckpt_path=resume, weights_only=False)
    states = [module.state_dict(), trainer.optimizers[0].state_dict(), trainer.precision_plugin.state_dict()]
    leaves = torch.utils._pytree.tree_leaves(states)
    tensors = [leaf.detach().clone() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return tensors, {step: readings[step] for step in readings if step > HALF}


def same(one, other):
    """Whether two results are equal, bit for bit."""
    assert len(one) == len(other) > 100
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_c8_a_resumed_run_is_the_one_that_was_not_stopped(tmp_path, seed):
    straight, readings = fit(tmp_path, seed)
    half = tmp_path / f"step={HALF}.ckpt"
    saved = torch.load(half, weights_only=False)
    resumed, seen = fit(tmp_path / "resumed", seed, half)
    assert same(straight, resumed)
    assert seen.keys() == readings.keys() == {25, 30, 35, 40}
    assert str(seen) == str(readings)
    (part,) = saved["FP8Precision"]["scales"]
    assert part["layers"]
    part["layers"] = {}
    torch.save(saved, tmp_path / "forgetful.ckpt")
    assert not same(straight, fit(tmp_path / "forgetful", seed, tmp_path / "forgetful.ckpt")[0])
