"""Bad gradients under `FP8Optimizer`, on the path of CPUs and on the one that asks no device."""

import copy
import pickle

import pytest
import torch
from torch import nn, optim
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fp8.optim import FP8Optimizer, enable_gradient_release, finite

BASES = {
    "AdamW": lambda params: optim.AdamW(params, lr=0.01),
    "NAdam": lambda params: optim.NAdam(params, lr=0.01),  # whose product of momenta is a scalar of its own
    "Adagrad": lambda params: optim.Adagrad(params, lr=0.01, initial_accumulator_value=0.1, lr_decay=0.1),
    "RMSprop": lambda params: optim.RMSprop(params, lr=0.01, momentum=0.9),
    "SGD": lambda params: optim.SGD(params, lr=0.01, momentum=0.9, dampening=0.5),  # which begins otherwise
    "Muon": lambda params: optim.Muon(params, lr=0.01),
}
SHAPES = {"a": (8, 200), "b": (4, 128)}


@pytest.fixture(params=[False, True], ids=["read", "masked"])
def masked(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(finite, "_FREE_TO_READ", ())
    return request.param


def parameters(dtype=torch.bfloat16):
    gen = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=gen).to(dtype)) for name, shape in SHAPES.items()}


def step_on(optimizer, params, step, bad=None):
    for name, p in params.items():
        gen = torch.Generator().manual_seed(10 * step + ord(name))
        p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)
    if bad is not None:
        params["b"].grad.view(-1)[-1] = bad
    optimizer.step()


def run(base, bad_at=(), *, dtype=torch.bfloat16, value=float("nan"), steps=5, **options):
    params = parameters(dtype)
    optimizer = FP8Optimizer(BASES[base](params.items()), **options)
    for step in range(steps):
        if step in bad_at:
            step_on(optimizer, params, 100 + step, value)
        step_on(optimizer, params, step)
    return params, optimizer


def assert_same(params, optimizer, others, other):
    optimizer.state_dict()  # which takes back what was masked last
    for name, p in params.items():
        q = others[name]
        assert torch.equal(p, q), name
        assert optimizer.state[p].keys() == other.state[q].keys()
        assert all(torch.equal(value, other.state[q][key]) for key, value in optimizer.state[p].items()), name


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bad_steps_leave_no_trace(base, dtype, masked):
    """The first one, two in a row and the last one: bit-equal to a run that never saw them."""
    expected = run(base, dtype=dtype)
    params, optimizer = run(base, (0, 2, 3), dtype=dtype)
    step_on(optimizer, params, 99, float("inf"))
    assert optimizer.skipped_steps == 4
    assert_same(params, optimizer, *expected)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 2.0**64])
def test_what_is_not_finite(value, masked):
    assert_same(*run("AdamW", (1,), value=value), *run("AdamW"))


def test_momentum_that_a_skipped_step_would_have_begun_has_not(masked):
    params, optimizer = run("SGD", steps=0)
    optimizer.param_groups[0]["momentum"] = 0.0
    others, other = run("SGD", steps=0)
    other.param_groups[0]["momentum"] = 0.0
    for ps, opt, bad in ((params, optimizer, True), (others, other, False)):
        step_on(opt, ps, 0)
        for group in opt.param_groups:
            group["momentum"] = 0.9
        if bad:
            step_on(opt, ps, 50, float("nan"))
        step_on(opt, ps, 1)
    assert_same(params, optimizer, others, other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))], ids=["copy", "pickle"])
def test_a_copy_takes_the_last_step_back_too(copied, masked):
    params, optimizer = run("NAdam", steps=2)
    step_on(optimizer, params, 99, float("nan"))
    others, other = copied((params, optimizer))
    assert other.skipped_steps == 0
    for step in (2, 3, 4):
        step_on(other, others, step)
    assert_same(others, other, *run("NAdam"))


def test_loading_forgets_what_was_to_be_taken_back(masked):
    params, optimizer = run("NAdam", steps=2)
    saved = copy.deepcopy(optimizer.state_dict())
    weights = {name: p.detach().clone() for name, p in params.items()}
    step_on(optimizer, params, 2)
    step_on(optimizer, params, 99, float("nan"))
    optimizer.load_state_dict(saved)
    assert optimizer.skipped_steps == 0
    for name, p in params.items():
        p.data.copy_(weights[name])
    for step in (2, 3, 4):
        step_on(optimizer, params, step)
    assert_same(params, optimizer, *run("NAdam"))


def test_raising_after_steps_in_a_row(masked):
    params, optimizer = run("AdamW", (1, 2), max_skipped_steps=2)
    step_on(optimizer, params, 98, float("nan"))
    with pytest.raises(FloatingPointError, match=r"^FP8Optimizer: the gradients of 2 steps in a row held NaN"):
        step_on(optimizer, params, 99, float("nan"))


@pytest.mark.parametrize("value", [0, -1])
def test_the_limit_is_checked(value):
    with pytest.raises(ValueError, match=f"^FP8Optimizer: max_skipped_steps is {value}; it must be more"):
        run("AdamW", max_skipped_steps=value)


def test_a_released_gradient_skips_its_parameter_alone(masked):
    model = nn.Sequential(nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False)).bfloat16()
    optimizer = FP8Optimizer(BASES["AdamW"](model.named_parameters()))
    enable_gradient_release(model, optimizer)
    x = torch.ones(2, 128, dtype=torch.bfloat16)
    model[0](x).sum().backward()
    optimizer.step()
    model[1](x).backward(torch.full((2, 128), float("inf"), dtype=torch.bfloat16))
    optimizer.step()
    optimizer.state_dict()
    steps = [int(optimizer.state[layer.weight].get("step", 0)) for layer in model]
    assert (steps, optimizer.skipped_steps) == ([1, 0], 1)


class DeviceReads(TorchDispatchMode):
    """Follows all that is made of some tensors, which stand for a device's, and lists what the host reads of it.

    A copy that does not block is the host's own; so are tensors that were on the host before.
    """

    def __init__(self, tensors):
        super().__init__()
        self.storages = {t.untyped_storage()._cdata for t in tensors}
        self.alive = []
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        flat = [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, torch.Tensor)]
        tainted = any(t.untyped_storage()._cdata in self.storages for t in flat)
        if tainted and func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(func))
        out = func(*args, **kwargs)
        if tainted and not kwargs.get("non_blocking"):
            made = [t for t in (out if isinstance(out, list | tuple) else [out]) if isinstance(t, torch.Tensor)]
            self.alive += made  # or their addresses would be used again
            self.storages |= {t.untyped_storage()._cdata for t in made}
        return out


@pytest.mark.parametrize("base", ["AdamW", "NAdam", "RMSprop", "SGD", "Muon"])
def test_a_step_waits_for_nothing_on_the_device(base, monkeypatch):
    monkeypatch.setattr(finite, "_FREE_TO_READ", ())
    params, optimizer = run(base, steps=2)
    for p in params.values():
        p.grad = torch.ones_like(p)
    on_device = [*params.values(), *(p.grad for p in params.values())]
    on_device += [value for p in params.values() for value in optimizer.state[p].values() if value.dim()]
    with DeviceReads(on_device) as reads:
        optimizer.step()
        optimizer.step()  # which looks at how the first one went
    assert reads.found == []
    with reads:
        assert optimizer.skipped_steps == 0
    assert reads.found  # so that the count can fail
