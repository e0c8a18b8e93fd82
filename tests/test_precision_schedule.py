"""Which steps run in FP8: the schedule at both ends of a run, and evaluation."""

import logging

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from phases import Gemms, phases
from small_models import Regression, batches, trainer
from torch import nn

from lightning_fp8 import FabricFP8Precision, FP8Precision
from lightning_fp8.compute.gemm import record_gemms

SCALES = ("running", "history", "scale", "nonfinite")


@pytest.mark.parametrize(
    ("schedule", "accumulate", "expected"),
    [
        ({}, 1, "FFFFFF"),
        ({"bf16_first_steps": 2}, 1, "BBFFFF"),
        ({"bf16_last_steps": 1}, 1, "FFFFFB"),
        ({"bf16_first_steps": 1, "bf16_last_steps": 3}, 1, "BFFBBB"),
        ({"bf16_first_steps": 9}, 1, "BBBBBB"),
        ({"bf16_first_steps": 1, "bf16_last_steps": 1}, 2, "BBFFBB"),  # optimizer steps, not batches
    ],
    ids=str,
)
def test_the_schedule_counts_optimizer_steps(tmp_path, caplog, schedule, accumulate, expected):
    counts, model = Gemms(), Regression()
    keys = list(model.state_dict())
    options = {"max_epochs": 1, "accumulate_grad_batches": accumulate, "callbacks": [counts]}
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, FP8Precision(**schedule), **options).fit(model, batches(6))
    assert phases(counts.training) == expected
    switches = [record.message for record in caplog.records if "on, linear layers run in" in record.message]
    steps = expected[::accumulate]
    changes = [i for i in range(1, len(steps)) if steps[i] != steps[i - 1]]
    names = {"F": "fp8", "B": "bf16"}
    assert switches == [f"FP8: from optimizer step {i} on, linear layers run in {names[steps[i]]}." for i in changes]
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_resumed_run_is_in_the_right_phase(tmp_path, stop):
    def plugin():
        return FP8Precision("delayed", bf16_first_steps=2, bf16_last_steps=2)

    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, plugin(), callbacks=[saves], enable_checkpointing=True).fit(Regression(), batches(6))
    counts = Gemms()
    resumed = trainer(tmp_path, plugin(), callbacks=[counts])
    with pytest.warns(UserWarning, match="mid-epoch|not resumable|resuming"):
        resumed.fit(Regression(), batches(6), ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert phases(counts.training) == "BBFFBB"[stop:]
    evaluated = Gemms()
    used = trainer(tmp_path, plugin(), callbacks=[evaluated], limit_val_batches=2)
    used.validate(Regression(), batches(2), ckpt_path=tmp_path / f"step={stop}.ckpt", verbose=False)
    assert phases(evaluated.evaluation) == 2 * "BBFFBB"[stop]  # as training there would go on


def test_a_plugin_used_again_starts_again(tmp_path):
    plugin = FP8Precision(bf16_first_steps=2)
    for _ in range(2):
        counts = Gemms()
        trainer(tmp_path, plugin, callbacks=[counts]).fit(Regression(), batches(4))
        assert phases(counts.training) == "BBFF"


def test_a_checkpoint_of_a_run_without_the_plugin_counts_as_well(tmp_path):
    saves = ModelCheckpoint(tmp_path, filename="bf16", save_top_k=-1, every_n_train_steps=4)
    first = trainer(tmp_path, precision="bf16-mixed", callbacks=[saves], enable_checkpointing=True)
    first.fit(Regression(), batches(4))
    counts = Gemms()
    used = trainer(tmp_path, FP8Precision(bf16_first_steps=6), callbacks=[counts], max_epochs=2)
    used.fit(Regression(), batches(4), ckpt_path=tmp_path / "bf16.ckpt")
    assert phases(counts.training) == "BBFF"


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield {"x": torch.ones(32), "id": torch.tensor(0)}


def test_an_unknown_end_is_refused_by_name(tmp_path):
    endless = torch.utils.data.DataLoader(Endless(), batch_size=16)
    used = trainer(tmp_path, FP8Precision(bf16_last_steps=3), max_epochs=-1)
    with pytest.raises(ValueError, match=r"^FP8Precision: bf16_last_steps needs to know.*Set max_steps or max_epochs"):
        used.fit(Regression(), endless)
    counts = Gemms()
    known = trainer(tmp_path, FP8Precision(bf16_last_steps=3), max_epochs=-1, max_steps=5, callbacks=[counts])
    known.fit(Regression(), endless)
    assert phases(counts.training) == "FFBBB"


def test_an_unknown_end_is_refused_with_fabric():
    plugin = FabricFP8Precision(bf16_last_steps=1)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[plugin])
    net = fabric.setup(nn.Linear(16, 16))
    with pytest.raises(ValueError, match=r"bf16_last_steps needs.*with Fabric, total_steps of the plugin"):
        net(torch.ones(16, 16))
    with torch.no_grad():
        net(torch.ones(16, 16))  # evaluation ends nowhere


def test_the_schedule_of_fabric():
    plugin = FabricFP8Precision(bf16_first_steps=1, bf16_last_steps=1, total_steps=3)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[plugin])
    net = nn.Linear(16, 16)
    net, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    counts = []
    for _ in range(3):
        with record_gemms() as gemms:
            fabric.backward(net(torch.ones(16, 16)).sum())
        optimizer.step()
        counts.append(len(gemms))
    assert phases(counts) == "BFB"


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
@pytest.mark.parametrize(("eval_precision", "expected"), [("fp8", "FFFF"), ("bf16", "BBBB")])
def test_evaluation_runs_in_the_precision_that_was_asked_for(tmp_path, verb, eval_precision, expected):
    counts = Gemms()
    used = trainer(tmp_path, FP8Precision(eval_precision=eval_precision), callbacks=[counts], limit_val_batches=4)
    options = {} if verb == "predict" else {"verbose": False}
    getattr(used, verb)(Regression(), batches(), **options)
    assert phases(counts.evaluation) == expected


class Gradients(Regression):
    """Evaluates with gradients, as force fields do."""

    def validation_step(self, batch, batch_idx):
        with torch.enable_grad():
            self.net(10 * batch["x"].requires_grad_()).sum().backward()
        self.zero_grad()


@pytest.mark.parametrize("model", [Regression, Gradients])
@pytest.mark.parametrize("eval_precision", ["fp8", "bf16"])
def test_evaluation_and_sanity_checks_leave_the_scales_alone(tmp_path, model, eval_precision):
    states = []
    for limit in (0, 2):
        torch.manual_seed(0)
        plugin = FP8Precision("delayed", eval_precision=eval_precision)
        used = trainer(
            tmp_path,
            plugin,
            limit_val_batches=limit,
            num_sanity_val_steps=2,
            val_check_interval=1,
            inference_mode=False,
        )
        used.fit(model(), batches(), batches())
        states.append(plugin.state_dict()["scales"][0]["layers"])
    assert len(states[0]) == 2
    for name, layer in states[0].items():
        assert all(torch.equal(layer[kind], states[1][name][kind]) for kind in SCALES)


def test_a_fit_that_evaluates_in_bf16_goes_on_in_fp8(tmp_path):
    counts = Gemms()
    plugin = FP8Precision(eval_precision="bf16", bf16_first_steps=1)
    used = trainer(tmp_path, plugin, callbacks=[counts], limit_val_batches=1, val_check_interval=1)
    used.fit(Regression(), batches(), batches())
    assert phases(counts.training) == "BFFF"
    assert set(phases(counts.evaluation)) == {"B"}


def test_evaluation_between_the_phases_follows_the_schedule(tmp_path):
    counts = Gemms()
    used = trainer(
        tmp_path,
        FP8Precision(bf16_first_steps=2),
        callbacks=[counts],
        limit_val_batches=1,
        val_check_interval=1,
        num_sanity_val_steps=0,
    )
    used.fit(Regression(), batches(), batches())
    assert phases(counts.training) == "BBFF"
    assert phases(counts.evaluation) == "BFFF"  # after the first, second, … step
