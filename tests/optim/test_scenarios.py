"""What torch's own tests ask of every optimizer, asked of ours: the cases of its optimizer database that apply."""

import copy
import inspect
import math

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_fp8.optim import FP8AdamW, FP8Optimizer, wrapper

OURS = {
    "FP8AdamW": lambda params, **o: FP8AdamW(params, **{"lr": 0.01, **o}),
    "AdamW": lambda params, **o: FP8Optimizer(optim.AdamW(params, **{"lr": 0.01, **o})),
    "SGD": lambda params, **o: FP8Optimizer(optim.SGD(params, **{"lr": 0.01, "momentum": 0.9, **o})),
}
every_optimizer = pytest.mark.parametrize("make", OURS.values(), ids=OURS)


def parameters(seed=0, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(s, generator=gen, dtype=torch.float32).to(dtype)) for s in ((8, 200), (4, 64), (7,))
    ]


def set_grads(params, step=0):
    for i, p in enumerate(params):
        gen = torch.Generator().manual_seed(100 * step + i)
        p.grad = torch.randn(p.shape, generator=gen, dtype=torch.float32).to(p.dtype)


def train(optimizer, params, steps=3):
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()


def same(params, others):
    return all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


TENSOR_LR = {"lr": torch.tensor(0.001)}
CONFIGURATIONS = {  # those of torch.testing._internal.common_optimizers for CPUs, less what is refused by name
    optim.Adam: [
        {"lr": 0.01},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        TENSOR_LR,
        {"lr": torch.tensor(0.001), "betas": (torch.tensor(0.9), torch.tensor(0.99))},
    ],
    optim.AdamW: [{"lr": 0.01}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}, TENSOR_LR],
    optim.NAdam: [
        {"lr": 1e-3},
        {"momentum_decay": 6e-3},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "momentum_decay": 6e-3},
        {"weight_decay": 0.1, "momentum_decay": 6e-3, "decoupled_weight_decay": True},
    ],
    optim.RAdam: [
        {"lr": 2e-3},
        {"eps": 1e-6},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"weight_decay": 0.1, "maximize": True},
    ],
    optim.Adamax: [{"lr": 0.1}, {"weight_decay": 0.1}, {"maximize": True}, {"weight_decay": 0.1, "maximize": True}],
    optim.Adagrad: [
        {"lr": 0.1},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"initial_accumulator_value": 0.1, "weight_decay": 0.1},
        {"lr": 0.1, "lr_decay": 0.5, "weight_decay": 0.1},
        TENSOR_LR,
    ],
    optim.RMSprop: [
        {"lr": 1e-3},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"maximize": True, "weight_decay": 0.1},
        {"weight_decay": 0.1, "momentum": 0.1},
    ],
    optim.SGD: [
        {"lr": 1e-2},
        TENSOR_LR,
        {"weight_decay": 0.5},
        {"momentum": 0.9},
        {"weight_decay": 0.1, "momentum": 0.9, "maximize": True},
        {"momentum": 0.9, "dampening": 0.5},
        {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True},
    ],
    optim.Muon: [
        TENSOR_LR,
        {"weight_decay": 0.2},
        {"momentum": 0.8},
        {"ns_steps": 6},
        {"ns_coefficients": (3.4, -4.7, 2.0)},
        {"adjust_lr_fn": "match_rms_adamw"},
    ],
}
CASES = [(kind, options) for kind, all_options in CONFIGURATIONS.items() for options in ({}, *all_options)]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=[f"{kind.__name__} {options}" for kind, options in CASES])
def test_every_configuration_of_torch(kind, options):
    """With fp32 state the result is torch's, bit for bit; with FP8 state it is close and resumable."""
    used = slice(0, 2) if kind is optim.Muon else slice(None)
    plain, exact, quantized = (parameters()[used] for _ in range(3))
    train(kind(plain, **options), plain, 6)
    train(FP8Optimizer(kind(exact, **options), moments="fp32"), exact, 6)
    assert same(plain, exact)
    ours = FP8Optimizer(kind(quantized, **options))
    train(ours, quantized, 6)
    for p, q, start in zip(plain, quantized, parameters(), strict=False):
        assert (p - q).norm() <= 0.055 * (p - start).norm()
    again = FP8Optimizer(kind(quantized, **options))
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert again.state_dict()["param_groups"] == ours.state_dict()["param_groups"]


@pytest.mark.parametrize("options", [{}, {"lr": 0.01}, {"weight_decay": 0.1}, TENSOR_LR], ids=str)
def test_fp8_adamw_in_torchs_configurations(options):
    plain, ours = parameters(), parameters()
    train(optim.AdamW(plain, **options), plain, 6)
    train(FP8AdamW(ours, **options), ours, 6)
    for p, q, start in zip(plain, ours, parameters(), strict=True):
        assert (p - q).norm() <= 0.055 * (p - start).norm()


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: optim.swa_utils.SWALR(o, 0.05, 3),
}
BASES = {"FP8AdamW": optim.AdamW, "AdamW": optim.AdamW, "SGD": lambda p, lr: optim.SGD(p, lr, momentum=0.9)}


def test_every_scheduler_of_torch_is_here():
    public = {
        name
        for name, value in vars(lr_scheduler).items()
        if inspect.isclass(value) and issubclass(value, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert public - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers_set_what_they_set_in_torch(name, scheduler, tensor_lr):
    """Learning rates and cycled betas or momentum are those of torch's optimizer, and the weights follow them."""
    made = []
    for make in (BASES[name], OURS[name]):
        params = parameters()
        optimizer = make(params, lr=torch.tensor(0.01) if tensor_lr else 0.01)
        schedule = SCHEDULERS[scheduler](optimizer)
        seen = []
        for step in range(7):
            set_grads(params, step)
            optimizer.step()
            schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
            group = optimizer.param_groups[0]
            seen.append((float(group["lr"]), group.get("betas"), group.get("momentum")))
        made.append((params, seen, schedule.state_dict()))
    (plain, expected, _), (ours, seen, state) = made
    assert seen == expected
    for p, q, start in zip(plain, ours, parameters(), strict=True):
        assert (p - q).norm() <= 0.055 * (p - start).norm()
    other = OURS[name](parameters(), lr=0.01)
    SCHEDULERS[scheduler](other).load_state_dict(state)


@every_optimizer
def test_groups_may_differ_in_learning_rate_and_decay(make):
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = make([{"params": params[:1], "lr": 0.0}, {"params": params[1:], "weight_decay": 0.5}], weight_decay=0.0)
    set_grads(params)
    optimizer.step()
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[1], before[1])
    alone = parameters()[1:]
    other = make(alone, weight_decay=0.0)
    set_grads(params)
    for p, q in zip(alone, params[1:], strict=True):
        p.grad = q.grad
    other.step()
    assert not torch.equal(params[1], alone[0])  # its decay was another


@every_optimizer
def test_a_group_may_be_added_between_steps(make):
    params = parameters()
    optimizer = make(params[:2])
    train(optimizer, params[:2])
    optimizer.add_param_group({"params": params[2:], "lr": 0.5})
    train(optimizer, params, 1)
    assert optimizer.state[params[2]]["step"] == 1
    assert optimizer.state[params[0]]["step"] == 4
    copied = make([{"params": parameters()[:2]}, {"params": parameters()[2:]}])
    copied.load_state_dict(optimizer.state_dict())
    assert copied.param_groups[1]["lr"] == 0.5
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": [params[0]]})
    with pytest.raises(TypeError, match="params argument given to the optimizer should be an iterable"):
        make(torch.zeros(2, 64))
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        make([])


@every_optimizer
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(make, set_to_none):
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, 1)
    optimizer.zero_grad(set_to_none=set_to_none)
    for p in params:
        assert p.grad is None if set_to_none else not p.grad.any()
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert same(params, before) is set_to_none  # gradients of zero still decay and follow their momentum


@every_optimizer
def test_hooks_run_once_a_step(make, monkeypatch):
    """Also where the step is made of many steps of chunks."""
    monkeypatch.setattr(wrapper, "_CHUNK_ELEMENTS", {"cpu": 64})
    params = parameters()
    optimizer, calls = make(params), []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("global before")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global after")),
    ]
    try:
        train(optimizer, params, 2)
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["global before", "before", "after", "global after"] * 2
    train(optimizer, params, 1)
    assert len(calls) == 8


@every_optimizer
def test_state_dict_hooks(make):
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, 1)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("before"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    saved = optimizer.state_dict()
    assert calls == ["before"]
    assert saved["note"] == 1

    def warm(_, state):
        state["param_groups"][0]["lr"] = 0.25

    optimizer.register_load_state_dict_pre_hook(warm)
    optimizer.register_load_state_dict_post_hook(lambda loaded: calls.append(loaded.param_groups[0]["lr"]))
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert calls == ["before", 0.25]


@every_optimizer
def test_nothing_happens_without_gradients(make):
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = make(params)
    optimizer.step()
    assert same(params, before)
    assert not any(optimizer.state.values())


@every_optimizer
def test_sparse_gradients_are_refused(make):
    layer = nn.Embedding(4, 128, sparse=True)
    optimizer = make(layer.parameters())
    layer(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"sparse; give its layer sparse=False"):
        optimizer.step()


@every_optimizer
def test_it_prints_and_its_state_dict_is_the_same_each_time(make):
    params = parameters()
    optimizer = make(params)
    train(optimizer, params)
    assert "lr: 0.01" in repr(optimizer)
    first, second = optimizer.state_dict(), optimizer.state_dict()
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    assert all(first["state"][i][k] is second["state"][i][k] for i in first["state"] for k in first["state"][i])


@every_optimizer
def test_a_copy_has_every_public_attribute_and_its_own_life(make):
    params = parameters()
    optimizer = make(params)
    train(optimizer, params)
    copied = copy.deepcopy(optimizer)
    public = {name for name in dir(optimizer) if not name.startswith("_")}
    assert public == {name for name in dir(copied) if not name.startswith("_")}
    copied.param_groups[0]["lr"] = 7.0
    assert optimizer.param_groups[0]["lr"] == 0.01
    state = optimizer.state[params[0]]
    before = {name: value.clone() for name, value in state.items()}
    train(copied, copied.param_groups[0]["params"], 1)
    assert all(torch.equal(value, before[name]) for name, value in state.items())


@every_optimizer
@pytest.mark.parametrize("saved_named", [True, False])
def test_state_dicts_load_with_names_and_without(make, saved_named):
    params, others = parameters(), parameters()
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    first = make(named if saved_named else params)
    train(first, params)
    second = make(others if saved_named else [(f"p{i}", p) for i, p in enumerate(others)])
    second.load_state_dict(first.state_dict())
    for p, q in zip(params, others, strict=True):
        assert all(torch.equal(value, second.state[q][name]) for name, value in first.state[p].items())
    assert "param_names" in second.param_groups[0]  # of either side


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(make, dtype):
    expected, params = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    train(make(expected), expected)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        train(make(params), params)
    finally:
        torch.set_default_dtype(before)
    assert same(expected, params)


@every_optimizer
def test_it_finds_the_minimum(make):
    """Rosenbrock's function in 64 pairs, as torch's tests descend it; each pair is one column of two rows."""
    p = nn.Parameter(torch.tensor([[1.5], [1.5]]).repeat(1, 64))
    optimizer = make([p], lr=2e-3 if "momentum" in make([p]).param_groups[0] else 0.02, weight_decay=0.0)
    if "momentum" in optimizer.param_groups[0]:
        optimizer.param_groups[0]["lr"] = 2e-4

    def distance():
        return ((1 - p[0]).square() + 100 * (p[1] - p[0].square()).square()).sum()

    def closure():
        optimizer.zero_grad()
        loss = distance()
        loss.backward()
        return loss

    start = distance().item()
    for _ in range(400):
        optimizer.step(closure)
    assert math.isfinite(distance().item())
    assert distance().item() < 1e-2 * start
