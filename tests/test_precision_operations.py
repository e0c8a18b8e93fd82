"""What the plugin adds to a step, in tensor operations: counted, not timed.

A step's operations are sorted by where they run: in casts, in GEMMs, or elsewhere. Elsewhere the plugin may do little
that a bf16 step does not do: the views of an operator, the sum of a bias, and at the end of a step with delayed scaling
a number of operations that does not grow with the model.
"""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fp8 import FabricFP8Precision
from lightning_fp8.compute import linear

HOST_READS = {"aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.equal", "aten.is_nonzero"}
FREE = {"aten.detach", "aten.view", "aten.t", "aten.transpose", "aten._unsafe_view", "aten.unbind", "aten.select"}
PLAIN_GEMMS = {"aten.mm", "aten.addmm"}


class Operations(TorchDispatchMode):
    """Counts operations, by name and by what they are part of."""

    def __init__(self):
        super().__init__()
        self.part = "elsewhere"
        self.counts = {"elsewhere": Counter(), "cast": Counter(), "gemm": Counter()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[self.part][str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def inside(self, part):
        before, self.part = self.part, part
        yield
        self.part = before

    def elsewhere(self):
        counts = self.counts["elsewhere"]
        return Counter({name: n for name, n in counts.items() if name not in FREE and name not in PLAIN_GEMMS})


def within(operations, part, function):
    def call(*args, **kwargs):
        with operations.inside(part):
            return function(*args, **kwargs)

    return call


def step(monkeypatch, layers, bias, **options):
    """The operations of the second step of a stack of linear layers; without options, in plain bf16."""
    plugins = {"plugins": [FabricFP8Precision(**options)]} if options else {"precision": "bf16-true"}
    fabric = Fabric(accelerator="cpu", devices=1, **plugins)
    net = nn.Sequential(*(nn.Linear(32, 32, bias=bias) for _ in range(layers)))
    net, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1, foreach=True))
    x = torch.randn(16, 32, dtype=torch.bfloat16, requires_grad=True)
    operations = Operations()
    with monkeypatch.context() as patch:
        patch.setattr(linear, "fp8_gemm", within(operations, "gemm", linear.fp8_gemm))
        for name in ("cast", "shared_cast"):
            patch.setattr(linear, name, within(operations, "cast", getattr(linear, name)))
        for watched in (False, True):
            with operations if watched else torch.enable_grad():
                fabric.backward(net(x).sum())
                optimizer.step()
                optimizer.zero_grad()
    return operations


@pytest.mark.filterwarnings("ignore:.*rounds them to nearest")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "rowwise", "blockwise", "mxfp8"])
def test_a_step_has_no_host_read_and_few_more_operations(monkeypatch, recipe, bias):
    extra = {}
    for layers in (2, 5):
        plain = step(monkeypatch, layers, bias)
        fp8 = step(monkeypatch, layers, bias, recipe=recipe, weights="bf16")
        for counts in fp8.counts.values():
            assert not HOST_READS & counts.keys()
        assert sum(fp8.counts["gemm"].values()) >= 3 * layers
        added = fp8.elsewhere()
        added.subtract(plain.elsewhere())
        extra[layers] = sum(added.values())
    a_layer = (extra[5] - extra[2]) / 3
    a_step = extra[2] - 2 * a_layer
    # The gradient of a bias is summed in fp32: a cast before and one after. Delayed scaling takes note of three
    # magnitudes a layer, by a maximum and a copy each, and advances all layers at once.
    delayed = recipe == "delayed"
    assert a_layer == (2 if bias else 0) + (3 * 2 if delayed else 0)
    assert a_step == (41 if delayed else 0)
