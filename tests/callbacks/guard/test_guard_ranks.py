"""A guard on two processes: what one of them sees, both act on, alike."""

import json

import torch
import torch.distributed as dist
from guarded import STEPS, batches_of, guard, run
from ranks import spawn

from lightning_fp8.callbacks.guard import RewindRule
from lightning_fp8.optim import FP8AdamW

DDP = {"strategy": "ddp", "devices": 2, "accumulate_grad_batches": 2}


def same_on_all(value):
    """The value, which must be the same on all ranks."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    assert gathered[0] == gathered[1]
    return value


def fingerprint(module):
    return {name: p.double().sum().item() for name, p in module.state_dict().items()}


def on_a_rank(folder, data):
    """What each of two processes does: only rank 1 meets what is bad."""
    rank = dist.get_rank()
    own = batches_of(data, 52, rank=rank, world_size=2)
    bad = own[28:32] if rank else []  # steps of data 14 and 15, of two batches each
    guarded = guard(rewind=RewindRule(snapshot_every=6, margin=0))
    module, _ = run(folder / "spike", data, guarded, bad=bad, noise=0.0, **DDP)
    (event,) = same_on_all([vars(event) for event in guarded.events])
    assert (event["step"], event["action"]) == (16, "rewind")
    assert "leaves out steps 14 to 15 of" in event["message"]
    same_on_all(fingerprint(module))
    assert len(module.seen) == 2 * (STEPS + 16 - 6)
    again = module.seen[32:]
    expected = own[12:28] + own[32:]
    assert len(again) == len(expected) == 36
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    if rank == 0:
        lines = (folder / "spike/events.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [event]
    for optimizer in (FP8AdamW, torch.optim.AdamW):
        guarded = guard()
        options = {"bad": own[9:10] if rank else [], "kind": "nan", "optimizer": optimizer, "steps": 6, **DDP}
        module, _ = run(folder / optimizer.__name__, data, guarded, **options)  # bad: the second batch of step 5
        (event,) = same_on_all([vars(event) for event in guarded.events])
        assert (event["step"], event["action"], event["figure"]) == (6, "skip", 1.0)
        assert all(p.isfinite().all() for p in module.parameters())
        same_on_all(fingerprint(module))


def test_two_processes_decide_alike(prepared, tmp_path):
    spawn(on_a_rank, 2, tmp_path, prepared)
