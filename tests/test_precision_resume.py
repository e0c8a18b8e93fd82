"""N steps, save, resume, N steps: equal to 2N steps, bit for bit, in everything that a checkpoint holds."""

import math

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import spawn
from small_models import QUIET
from states import differences
from torch.nn import functional as F

from lightning_fp8 import FabricFP8Precision, FP8Precision
from lightning_fp8.data import TokenDataModule
from lightning_fp8.models import Decoder, DecoderConfig, DecoderLM
from lightning_fp8.optim import FP8AdamW, WarmupCosine

SHAPE = DecoderConfig(vocab_size=272, hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=64)
N, ACCUMULATE = 3, 2  # an epoch has about 20 steps on one process: both halves lie within it
RECIPES = {"tensorwise": "tensorwise", "delayed": {"preset": "delayed", "history": 4}}


class Seen(Callback):
    """Keeps the batches."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch.clone())


def fit(folder, data, recipe, seed, resume=None, weights="bf16", **options):
    """Trains 2N steps, saving after N and 2N; returns the batches seen and the final checkpoint.

    With it goes what this process has itself: the checkpoint is the first one's.
    """
    seed_everything(seed, verbose=False)
    seen = Seen()
    saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=N, save_top_k=-1)
    plugin = FP8Precision(RECIPES[recipe], weights=weights, bf16_first_steps=1, bf16_last_steps=1)
    trainer = Trainer(
        max_steps=2 * N,
        accumulate_grad_batches=ACCUMULATE,
        plugins=[plugin],
        callbacks=[seen, saves],
        default_root_dir=folder,
        limit_val_batches=1,
        val_check_interval=ACCUMULATE,
        check_val_every_n_epoch=None,
        **{**QUIET, **options},
    )
    model = DecoderLM(SHAPE, schedule=WarmupCosine(warmup_steps=2))
    trainer.fit(model, datamodule=TokenDataModule(str(data), sequence_length=8, batch_size=2), ckpt_path=resume)
    saved = torch.load(f"{folder}/step={2 * N}.ckpt", weights_only=True)
    saved.pop("callbacks")  # paths and times
    saved["own"] = [model.state_dict(), trainer.optimizers[0].state_dict(), plugin.state_dict()]
    return seen.batches, saved


def check_trainer(folder, data, recipe, **options):
    whole, expected = fit(folder / "whole", data, recipe, seed=0, **options)
    rest, resumed = fit(folder / "rest", data, recipe, seed=1, resume=folder / f"whole/step={N}.ckpt", **options)
    assert len(whole) == 2 * N * ACCUMULATE
    assert differences(whole[N * ACCUMULATE :], rest) == []
    assert not (found := differences(expected, resumed)), found
    assert expected["global_step"] == 2 * N
    moments = expected["own"][1]["state"]
    assert len(moments) == len(list(expected["state_dict"]))
    no_gap = ("v_split", "v_gap")  # nothing to leave out of the second moments of so even a gradient
    values = [v for state in moments.values() for name, v in state.items() if v.ndim == 2 and name not in no_gap]
    assert all(value.any() for value in values)
    state = expected["FP8Precision"]
    assert state["steps"] == 2 * N
    if recipe == "delayed":
        layers = state["scales"][0]["layers"]
        assert len(layers) == 7  # and 3 steps in FP8 between those in bf16 filled some of each history
        assert all((layer["history"] > 0).sum() == 3 * (2 * N - 2) for layer in layers.values())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_the_trainer_resumes_bit_for_bit(prepared, tmp_path, recipe, weights):
    check_trainer(tmp_path, prepared, recipe, weights=weights)


def loop(folder, data, recipe, seed, *, resume=False, **options):
    """As `fit`, in a plain loop; resumes what an earlier call saved after N steps."""
    plugin = FabricFP8Precision(RECIPES[recipe], weights="bf16", cache_weights=True, bf16_first_steps=1)
    fabric = Fabric(accelerator="cpu", plugins=[plugin], **options)
    fabric.launch()
    seed_everything(seed, verbose=False)
    decoder = Decoder(SHAPE)
    optimizer = FP8AdamW(decoder.named_parameters(), lr=1e-2)
    decoder, optimizer = fabric.setup(decoder, optimizer)
    loader = fabric.setup_dataloaders(
        TokenDataModule(str(data), sequence_length=8, batch_size=2).train_dataloader(), use_distributed_sampler=False
    )
    state = {"model": decoder, "optimizer": optimizer, "fp8": plugin, "loader": loader, "step": 0}
    if resume:
        fabric.load(folder / "half.ckpt", state, weights_only=True)
    seen = []
    for batch in loader:
        seen.append(batch)
        ends = len(seen) % ACCUMULATE == 0
        with fabric.no_backward_sync(decoder, enabled=not ends):
            loss = F.cross_entropy(decoder(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            fabric.backward(loss / ACCUMULATE)
        if not ends:
            continue
        optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1
        if state["step"] == N and not resume:
            fabric.save(folder / "half.ckpt", state)
        if state["step"] == 2 * N:
            break
    return seen, [*decoder.state_dict().values(), optimizer.state_dict(), plugin.state_dict()]


def check_fabric(folder, data, recipe, **options):
    whole, expected = loop(folder, data, recipe, seed=0, **options)
    rest, resumed = loop(folder, data, recipe, seed=1, resume=True, **options)
    assert len(whole) == 2 * N * ACCUMULATE
    assert differences(whole[N * ACCUMULATE :], rest) == []
    assert not (found := differences(expected, resumed)), found


@pytest.mark.parametrize("recipe", RECIPES)
def test_fabric_resumes_bit_for_bit(prepared, tmp_path, recipe):
    check_fabric(tmp_path, prepared, recipe, devices=1)


def on_a_rank(folder, data):
    """What each of two processes does; the ranks read different batches and must end with the same weights."""
    check_trainer(folder / "trainer", data, "delayed", strategy="ddp", devices=2)
    check_fabric(folder / "fabric", data, "delayed", strategy="ddp", devices=2)
    batches, states = loop(folder / "fabric", data, "tensorwise", seed=0, strategy="ddp", devices=2)
    own = [torch.stack(batches).double().sum(), sum(value.double().sum() for value in states[:-2])]
    gathered = [None, None]
    dist.all_gather_object(gathered, [value.item() for value in own])
    assert gathered[0][0] != gathered[1][0]
    assert gathered[0][1] == gathered[1][1]
    assert not math.isnan(gathered[0][1])


def test_two_processes_resume_bit_for_bit(prepared, tmp_path, caplog):
    for name in ("trainer", "fabric"):
        (tmp_path / name).mkdir()
    spawn(on_a_rank, 2, tmp_path, prepared)
    check_another_world_size(tmp_path, prepared, caplog)


def check_another_world_size(folder, data, caplog):
    """What two processes saved goes on in one, scales included."""
    halfway = torch.load(folder / f"trainer/whole/step={N}.ckpt", weights_only=True)
    (folder / "one").mkdir()
    with caplog.at_level("INFO"):
        _, saved = fit(folder / "one", data, "delayed", seed=1, resume=folder / f"trainer/whole/step={N}.ckpt")
    assert saved["global_step"] == saved["FP8Precision"]["steps"] == 2 * N
    assert "calibrate" not in caplog.text
    # A history has four entries, the newest first: two were there, and two of the three steps that followed ran in FP8.
    before, after = (state["FP8Precision"]["scales"][0]["layers"] for state in (halfway, saved))
    assert len(before) == 7
    for name, layer in before.items():
        assert torch.equal(after[name]["history"][:, 2:], layer["history"][:, :2])
