"""A NaN gradient on one of two ranks: the reduction gives it to both; see `test_fault_matrix.py`."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch.distributed as dist
from judge import Found, Outcome, Row, complaints, mutants
from lightning.pytorch import Callback
from ranks import spawn
from trials import Setup, run, skips

SEEDS = (0, 1, 2)
BAD_RANK = Row(
    name="a NaN gradient on one rank",
    onset=40,
    detector="nonfinite",
    within=5,
    cure="the step is left out, on all ranks",
    test="stability/test_rank_fault.py",
    alarms_when_cured=True,
)
TASK = Setup(skips, steps=80, lr=1e-2)


class OneBadGradient(Callback):
    """In one step a gradient of rank 1 is NaN before gradients are reduced."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.hook = None
        if trainer.global_step + 1 == BAD_RANK.onset and trainer.global_rank == 1:
            weight = pl_module.decoder.blocks[0].mlp.up_proj.weight
            self.hook = weight.register_hook(lambda grad: grad * float("nan"))

    def on_after_backward(self, trainer, pl_module):
        if self.hook is not None:
            self.hook.remove()


BROKEN = replace(TASK, faults=(OneBadGradient,), guard=(("skip_nonfinite", False),))
CURED = replace(TASK, faults=(OneBadGradient,))


def on_a_rank(folder):
    ddp = partial(run, strategy="ddp", devices=2)
    found = {
        name: [(one.loss, one.first("nonfinite")) for one in (ddp(setup, seed) for seed in SEEDS)]
        for name, setup in {"clean": TASK, "broken": BROKEN, "cured": CURED}.items()
    }
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_a_bad_gradient_on_one_rank_breaks_both_and_is_left_out_by_both(tmp_path):
    spawn(on_a_rank, 2, tmp_path)
    found, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    print(f"\n{found}")
    assert str(found) == str(other)  # NaN is not equal to itself
    outcomes = Found(*([Outcome(*one) for one in found[name]] for name in Found._fields))
    # Steps that are not left out are not counted: it is the cured run that has the alarm.
    seen = zip(outcomes.broken, outcomes.cured, strict=True)
    outcomes = outcomes._replace(broken=[bad._replace(alarm=mended.alarm) for bad, mended in seen])
    assert complaints(BAD_RANK, outcomes) == []
    for missing, mutant in mutants(BAD_RANK, outcomes):
        assert complaints(BAD_RANK, mutant), missing
