"""A guard in the Trainer: what it costs, what it refuses, steps that are left out, loaders of others."""

import math
import shutil
from collections import Counter

import pytest
import torch
from guarded import SHAPE, STEPS, batches_of, data_of, guard, run, trained
from lightning.pytorch import Trainer, seed_everything
from small_models import QUIET, Regression
from test_precision_resume import differences
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_fp8 import FP8Precision
from lightning_fp8.callbacks import AdaptiveClipping, FP8Guard, FP8Monitor
from lightning_fp8.callbacks.guard import FallbackRule, RewindRule, SpikeRule
from lightning_fp8.callbacks.guard.nonfinite import StepSkipper
from lightning_fp8.callbacks.readings import Reading
from lightning_fp8.compute.linear import FP8Linear
from lightning_fp8.models import DecoderLM
from lightning_fp8.optim import FP8AdamW, FP8Optimizer, ZClip

READS = ("tolist", "item", "__float__", "__int__", "__bool__", "cpu", "numpy", "to")


@pytest.fixture
def reads(monkeypatch):
    """How often the host asks a tensor for its content, while `reads["on"]`; a copy to the CPU counts too."""
    counts = Counter()

    def counted(name, plain):
        def call(self, *args, **kwargs):
            if counts["on"] and (name != "to" or "cpu" in args):
                counts["reads"] += 1
            return plain(self, *args, **kwargs)

        return call

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    return counts


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Counted(FP8Guard):
    """Notes, by step, the operations and host reads of its hooks."""

    counts: Counter

    def __init__(self, counts, **options):
        super().__init__(**options)
        self.counts, self.found = counts, {}

    def on_train_batch_end(self, trainer, *args):
        self._count(trainer.global_step, super().on_train_batch_end, trainer, *args)

    def on_before_optimizer_step(self, trainer, *args):
        self._count(trainer.global_step + 1, super().on_before_optimizer_step, trainer, *args)

    def _count(self, step, hook, *args):
        self.counts.update(on=1)
        before = self.counts["reads"]
        with Operations() as operations:
            hook(*args)
        self.counts["on"] = 0
        names, reads = self.found.get(step, ([], 0))
        free = [name for name in operations.names if name not in ("detach", "unbind", "select")]
        self.found[step] = names + free, reads + self.counts["reads"] - before


def test_a_guard_that_sees_nothing_changes_nothing_and_costs_what_it_says(prepared, tmp_path, reads):
    plain = run(tmp_path / "plain", prepared)[1]
    rewind = RewindRule(snapshot_every=10)
    guarded = Counted(reads, fallback=FallbackRule(), check_every=5, rewind=rewind)
    saved = run(tmp_path / "guarded", prepared, FP8Monitor(every_n_steps=5), guarded)[1]
    assert not (found := differences(plain, saved)), found
    assert guarded.events == ()
    assert not (tmp_path / "guarded/events.jsonl").exists()
    # The first step takes a snapshot, as every tenth does; the last looks at what is left.
    due = {1, 5, 10, 15, 20, STEPS}
    assert {step: found for step, found in guarded.found.items() if step not in due} == {
        step: ([], 0) for step in range(1, STEPS + 1) if step not in due
    }
    for step in due - {1, 10, 20}:
        names, count = guarded.found[step]
        assert count == 1
        assert set(names) <= {"_to_copy", "stack", "cat"}
        assert names.count("stack") + names.count("cat") == 1


def of(kind):
    """An optimizer of two parameters, and the state that a step must leave as it is."""
    params = [torch.nn.Parameter(torch.ones(4, 64)), torch.nn.Parameter(torch.ones(3))]
    optimizers = {
        "fp8": lambda: FP8AdamW(params, lr=0.1),
        "wrapped": lambda: FP8Optimizer(torch.optim.SGD(params, lr=0.1, momentum=0.9)),
        "fused": lambda: torch.optim.AdamW(params, lr=0.1, fused=True),
        "plain": lambda: torch.optim.AdamW(params, lr=0.1),
        "sgd": lambda: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    }
    return params, optimizers[kind]()


@pytest.mark.parametrize("kind", ["fp8", "wrapped", "fused", "plain", "sgd"])
def test_a_step_whose_gradients_are_not_finite_leaves_all_as_it_is(kind, reads):
    params, optimizer = of(kind)
    skipper = StepSkipper(optimizer)
    bad = [1.0, math.nan, 1.0, math.inf, -math.inf, 1.0]
    for i, value in enumerate(bad):
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        params[1].grad[1] = value
        before = [p.detach().clone() for p in params]
        state = {key: {k: torch.as_tensor(v).clone() for k, v in s.items()} for key, s in optimizer.state.items()}
        reads["on"] = 1
        skipper.before_step()
        reads["on"] = 0
        optimizer.step()
        same = all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        if math.isfinite(value):
            assert not same
        else:
            assert same
            assert differences(state, {key: dict(s) for key, s in optimizer.state.items()}) == []
        assert skipper.counts.tolist()[0] == sum(not math.isfinite(v) for v in bad[: i + 1])
    assert reads["reads"] == (0 if kind in ("fp8", "wrapped", "fused") else len(bad))


@pytest.mark.parametrize("optimizer", [FP8AdamW, torch.optim.AdamW], ids=["FP8AdamW", "AdamW"])
def test_left_out_steps_are_counted_and_survive_a_kill(prepared, tmp_path, optimizer):
    bad = [batches_of(prepared, 20)[i] for i in (4, 10)]
    options = {"bad": bad, "kind": "nan", "optimizer": optimizer, "noise": 0.0}
    whole = guard(check_every=6, rewind=None)
    expected = run(tmp_path / "whole", prepared, whole, **options)[1]
    assert [(e.step, e.kind, e.action, e.figure) for e in whole.events] == [
        (6, "nonfinite", "skip", 1.0),
        (12, "nonfinite", "skip", 1.0),
    ]
    run(tmp_path / "killed", prepared, guard(check_every=6, rewind=None), stop=11, **options)
    resume = shutil.copy(tmp_path / "killed/step=11.ckpt", tmp_path / "resume.ckpt")
    again = guard(check_every=6, rewind=None)
    saved = run(tmp_path / "killed", prepared, again, seed=1, resume=resume, **options)[1]
    assert again.events == whole.events
    assert not (found := differences(expected, saved)), found
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_gradient_release_is_refused_by_name(prepared, tmp_path):
    def fit(guarded):
        module = DecoderLM(SHAPE, gradient_release=True)
        options = {"plugins": [FP8Precision(weights="bf16")], "default_root_dir": tmp_path, "limit_val_batches": 0}
        trainer = Trainer(max_steps=2, callbacks=[guarded], enable_checkpointing=False, **{**QUIET, **options})
        trainer.fit(module, datamodule=data_of(prepared))

    with pytest.raises(ValueError, match=r"gradient release.*skip_nonfinite: false"):
        fit(guard())
    with pytest.raises(ValueError, match=r"AdaptiveClipping.*gradient release"):
        fit(AdaptiveClipping(ZClip()))
    fit(guard(skip_nonfinite=False))


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"divide rewind\.snapshot_every"):
        FP8Guard(check_every=7)
    with pytest.raises(ValueError, match="larger"):
        FP8Guard(check_every=10, rewind=RewindRule(snapshot_every=10))
    for callbacks in ([FP8Guard()], [FP8Guard(), FP8Monitor()]):
        trainer = Trainer(max_steps=1, callbacks=callbacks, default_root_dir=tmp_path, **QUIET)
        with pytest.raises(ValueError, match="list an FP8Monitor before it"):
            trainer.fit(Regression(), DataLoader([{"x": torch.randn(32), "id": torch.tensor(0)}]))


class Scripted(FP8Monitor):
    """Reads what a test says: the underflow of one layer's input by step."""

    def __init__(self, layer, alarming):
        super().__init__(every_n_steps=1000)
        self.layer, self.alarming = layer, alarming

    def on_train_batch_end(self, trainer, pl_module, *args):
        step = trainer.global_step
        if step % 2 == 0:
            values = {self.layer: {"input": {"underflow": 0.9 if step in self.alarming else 0.0}}}
            for listener in self.listeners:
                listener(trainer, Reading(step, values))


LAYER = "decoder.blocks.0.mlp.down_proj"


class InFP8(Scripted):
    """Also notes which of two layers run in FP8 at each step."""

    def __init__(self, *args):
        super().__init__(*args)
        self.ran = {}

    def on_before_backward(self, trainer, pl_module, loss):
        layers = {n: m for n, m in pl_module.named_modules() if isinstance(m, FP8Linear)}
        fp8 = {n for n, m in layers.items() if m.fp8_active and not m.fp8_fallback}
        self.ran[trainer.global_step] = (LAYER in fp8, len(fp8) > 1)


def test_a_layer_falls_back_and_returns_and_a_killed_run_takes_the_same_way(prepared, tmp_path):
    rule, alarming = FallbackRule(calm=3), {4, 6}  # readings come every second step: back after 8, 10, 12

    def part(folder, **options):
        monitor, guarded = InFP8(LAYER, alarming), guard(alarms=None, fallback=rule)
        saved = run(tmp_path / folder, prepared, monitor, guarded, noise=0.0, **options)[1]
        return monitor, guarded, saved

    monitor, whole, expected = part("whole")
    assert [(e.step, e.action, e.layer) for e in whole.events if e.metric != "input underflow, warn"] == [
        (4, "warn", LAYER),
        (4, "warn", LAYER),
        (6, "fallback", LAYER),
        (12, "return", LAYER),
    ]
    # The schedule has the first step in BF16 for all, and leaves the fallen one there.
    both, others = (True, True), (False, True)
    phases = [monitor.ran[step] for step in (0, 1, 5, 6, 11, 12, 23)]
    assert phases == [(False, False), both, both, others, others, both, both]
    part("killed", stop=9)
    resume = shutil.copy(tmp_path / "killed/step=9.ckpt", tmp_path / "resume.ckpt")
    rest, resumed, saved = part("killed", seed=1, resume=resume)
    assert resumed.events == whole.events
    assert rest.ran == {step: ran for step, ran in monitor.ran.items() if step >= 9}
    assert not (found := differences(expected, saved)), found
    unguarded = run(tmp_path / "plain", prepared, noise=0.0)[1]
    assert differences(trained(unguarded), trained(saved))  # BF16 is another number


class Stateful(DataLoader):
    """Can go back, by a state dict."""

    at = 0
    resumed = False

    def __iter__(self):
        if not self.resumed:
            self.at = 0
        self.resumed = False
        for i, batch in enumerate(super().__iter__()):
            if i >= self.at:
                self.at = i + 1
                yield batch

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at, self.resumed = state["at"], True


class Bad(Regression):
    """Notes the ids of batches it takes; bad ones have a loss of 1e6."""

    def __init__(self, bad):
        super().__init__(lambda params, lr: torch.optim.SGD(params, lr=1e-3))
        self.bad, self.ids = bad, []

    def training_step(self, batch, batch_idx):
        self.ids.append(int(batch["id"][0]))
        loss = super().training_step(batch, batch_idx)
        return loss * 1e6 if self.ids[-1] in self.bad else loss


@pytest.mark.parametrize("kind", [Stateful, DataLoader])
def test_loaders_of_others_go_back_if_they_can(tmp_path, kind):
    seed_everything(0, verbose=False)
    rows = [{"x": torch.randn(32), "id": torch.tensor(i)} for i in range(40)]
    module = Bad(bad={14, 15})
    guarded = guard(spikes=SpikeRule(window=8, arm_after=3))
    options = {"default_root_dir": tmp_path, "enable_checkpointing": False, "limit_val_batches": 0, **QUIET}
    trainer = Trainer(max_epochs=1, callbacks=[guarded], plugins=[FP8Precision()], **options)
    trainer.fit(module, kind(rows, batch_size=1))
    (event,) = guarded.events
    assert event.action == "rewind"
    if kind is Stateful:  # back to 6, without 14 and 15
        assert module.ids == [*range(16), *range(6, 14), *range(16, 40)]
        assert trainer.global_step == 38
        assert "no state" not in event.message
    else:  # on from where it is, with the weights of 6
        assert module.ids == [*range(40)]
        assert trainer.global_step == 30
        assert "no state to go back to" in event.message


def test_adaptive_clipping_goes_back_too(prepared, tmp_path):
    bad = [batches_of(prepared, 20)[i] for i in (14, 15)]
    clipping = AdaptiveClipping(ZClip(warmup_steps=4))
    guarded = guard()
    run(tmp_path / "a", prepared, guarded, clipping, bad=bad)
    assert [event.action for event in guarded.events] == ["rewind"]
    seen = clipping.state_dict()["state"][0].item()
    assert seen == STEPS  # norms of steps that were undone are not among them
