"""Any order of steps, saves, loads, conversions and restorations: a run that is loaded goes on as the one saved.

What was done after each save is done again to what is loaded from it, and both must be the same to the bit. A save that
is damaged is refused, and leaves nothing behind.
"""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from lightning_fp8 import convert_linears, end_step, fp8_state_dict, load_fp8_state_dict
from lightning_fp8.checkpoint.integrity import check_checkpoint
from lightning_fp8.compute import restore_linears
from lightning_fp8.files import write_whole
from lightning_fp8.optim import FP8AdamW

RECIPES = ("tensorwise", "delayed", "rowwise", "blockwise")


class Run:
    """A small training, of which everything is in `state`."""

    def __init__(self, recipe):
        torch.manual_seed(0)
        self.recipe = recipe
        self.model = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128, bias=False)).bfloat16()
        self.optimizer = FP8AdamW(self.model.named_parameters(), lr=1e-3)
        self.optimizer.param_groups[0].setdefault("differentiable", False)  # which torch adds when it loads
        self.convert()

    def convert(self):
        convert_linears(self.model, self.recipe, keep_high_precision=())
        self.converted = True

    def restore(self):
        restore_linears(self.model)
        self.converted = False

    def step(self, seed):
        x = torch.randn(16, 128, generator=torch.Generator().manual_seed(seed)).bfloat16()
        self.model(x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.converted:
            end_step(self.model)

    def do(self, what, *args):
        getattr(self, what)(*args)

    def state(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "fp8": fp8_state_dict(self.model) if self.converted else None,
            "converted": self.converted,
        }

    @classmethod
    def load(cls, recipe, path):
        check_checkpoint(path)
        state, run = torch.load(path, weights_only=True), cls(recipe)
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        if state["converted"]:
            load_fp8_state_dict(run.model, state["fp8"])
        else:
            run.restore()
        return run


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype is b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Training(RuleBasedStateMachine):
    """Orders of what can be done to a run."""

    @initialize(recipe=st.sampled_from(RECIPES))
    def begin(self, recipe):
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name, "last.ckpt")
        self.run, self.since = Run(recipe), None

    def do(self, what, *args):
        self.run.do(what, *args)
        if self.since is not None:
            self.since.append((what, *args))

    @rule(seed=st.integers(0, 99))
    def step(self, seed):
        self.do("step", seed)

    @precondition(lambda self: self.run.converted)
    @rule()
    def restore(self):
        self.do("restore")

    @rule()
    def convert(self):
        self.do("convert")

    @rule()
    def save(self):
        write_whole(self.path, lambda file: torch.save(self.run.state(), file))
        self.since = []

    @precondition(lambda self: self.since is not None)
    @rule()
    def load(self):
        loaded = Run.load(self.run.recipe, self.path)
        for what, *args in self.since:
            loaded.do(what, *args)
        assert same(loaded.state(), self.run.state())
        self.run = loaded

    @precondition(lambda self: self.since is not None)
    @rule(at=st.floats(0, 0.99))
    def damage(self, at):
        content = self.path.read_bytes()
        damaged = self.path.with_name("damaged.ckpt")
        damaged.write_bytes(content[: int(len(content) * at)])
        with pytest.raises(ValueError, match=r"damaged\.ckpt is damaged"):
            Run.load(self.run.recipe, damaged)

    @invariant()
    def nothing_is_half_written(self):
        if hasattr(self, "path"):
            assert not list(self.path.parent.glob("*.unfinished"))

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()


Training.TestCase.settings = settings(
    max_examples=15, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
)
TestTraining = Training.TestCase
