"""DDP and FSDP2 through the Trainer, on real processes: what one process would have computed."""

import pytest
import torch
from multi import assert_all_have, contents, different, fit, smooth
from ranks import spawn
from torch.distributed.tensor import DTensor

from lightning_fp8 import FP8Precision, Recipe
from lightning_fp8.compute.recipe import resolve_recipe

SYNCED = Recipe(sync_amax=True)
STRATEGIES = ("ddp", "fsdp2")
SEEDS = 5


def on_a_rank(folder, data):
    fp8_all_gather_changes_nothing(folder, data)
    losses_are_those_of_one_process(folder, data)
    for name in STRATEGIES:
        everything_together(folder, data, name)


def losses_are_those_of_one_process(folder, data):
    options = {"optimizer": smooth, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "steps": 4}
    errors = {}
    for recipe in (None, SYNCED, Recipe()):
        expected = torch.tensor(fit(folder, data, recipe=recipe, **options)[2].losses).double()
        assert len(expected) == 8
        assert expected[-2:].mean() < expected[:2].mean() - 0.02  # it learns
        for name in STRATEGIES if recipe != Recipe() else ("ddp",):
            actual = torch.tensor(fit(folder, data, name, recipe=recipe, **options)[2].losses).double()
            errors[recipe, name] = ((actual - expected).abs() / expected).max().item()
    local = errors.pop((Recipe(), "ddp"))
    # fp32 sums in another order: measured 9e-8, and 2e-4 where each process has scales of its own.
    assert all(error < 2e-6 for error in errors.values()), errors
    assert local > 2e-5  # or the comparison would see nothing


def everything_together(folder, data, name):
    plugin = FP8Precision("delayed", weights="bf16", bf16_first_steps=1)
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "limit_val_batches": 2, "val_check_interval": 4}
    trainer, model, seen = fit(folder, data, name, plugin, check_val_every_n_epoch=None, **options)
    found = contents(trainer, model)
    assert_all_have(found)
    assert len(seen.validations) >= 2
    assert seen.validations[-1] < seen.validations[0]
    histories = [value for key, value in found.items() if key.startswith("history")]
    assert len(histories) == 14
    # Each of the five steps in FP8 entered the history: the weight's was reduced over the parts of it.
    assert all((history > 0).sum(1).tolist() == [5, 5, 5] for history in histories)
    assert any(key.startswith("m_codes") and value.dtype is torch.uint8 for key, value in found.items())
    moments = trainer.optimizers[0].state[model.decoder.blocks[0].mlp.up_proj.weight]
    assert isinstance(moments["m_codes"], DTensor) is (name == "fsdp2")


def fp8_all_gather_changes_nothing(folder, data):
    results = []
    for gather in (False, True):
        plugin = FP8Precision(weights="bf16", fp8_all_gather=gather)
        trainer, model, seen = fit(folder, data, "fsdp2", plugin, limit_val_batches=1)
        results.append((seen.losses, seen.validations, contents(trainer, model)))
    assert results[0][:2] == results[1][:2]
    assert different(results[0][2], results[1][2]) == []
    weight = model.decoder.blocks[0].mlp.up_proj.weight
    assert type(weight._local_tensor).__name__ == "Shard"
    assert type(model.state_dict()["decoder.blocks.0.mlp.up_proj.weight"].to_local()) is torch.Tensor


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_compute_what_one_does(processes, prepared, tmp_path):
    spawn(on_a_rank, processes, tmp_path, prepared)


def local_scales_over_50_steps(folder, data):
    """Paired with one process, seed for seed; every rank runs that one, too, so that all come to the same."""
    ends = {"alone": [], "ddp": []}
    for seed in range(SEEDS):
        for name, found in ends.items():
            _, _, seen = fit(folder, data, name, recipe=Recipe(), optimizer=smooth, steps=50, seed=seed)
            found.append(torch.tensor(seen.losses[-10:]).mean().item())
    alone, local = torch.tensor(ends["alone"]), torch.tensor(ends["ddp"])
    gaps = local - alone
    assert gaps.abs().max() > 0  # or the scales were not local
    assert gaps.abs().max() < alone.std(), (gaps, alone)
    assert alone.std() < 0.1 * alone.mean()  # a noise in which anything would be lost says nothing


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_local_scales_stay_within_the_noise_of_seeds(processes, prepared, tmp_path):
    spawn(local_scales_over_50_steps, processes, tmp_path, prepared)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"recipe": "rowwise"}, "of the weight, it is scaled by row"),
        ({"bf16_last_steps": 3}, "have been through FP8"),
        ({"eval_precision": "bf16"}, "have been through FP8"),
    ],
)
def test_an_all_gather_that_cannot_be_is_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        FP8Precision(fp8_all_gather=True, **options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scaling": "delayed"}, "delayed scaling always does so"),
        ({"preset": "rowwise"}, "here it is input by row"),
    ],
)
def test_a_shared_amax_is_one_of_whole_tensors(options, reason):
    with pytest.raises(ValueError, match=reason):
        resolve_recipe({"sync_amax": True, **options})
