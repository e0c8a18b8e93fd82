"""What torch's own tests ask of every optimizer, asked of ours."""

import copy
import math

import pytest
import torch
from scenarios import every_optimizer, parameters, same, set_grads, train
from torch import nn, optim
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_fp8.optim import FP8Optimizer, expanded


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
    monkeypatch.setattr(expanded, "_CHUNK_ELEMENTS", {"cpu": 64})
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


@every_optimizer
def test_what_torch_refuses_is_refused(make):
    """The errors and warnings that torch's database lists for every optimizer."""
    params = parameters()
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        make([params[0], params[0]])
    with pytest.raises(ValueError, match=r"(Tensor lr must be 1-element|lr is a tensor of 2 elements)"):
        make(params, lr=torch.tensor([0.001, 0.002]))
    with pytest.raises(ValueError, match="all optimizer params should be with/without names"):
        make([("p0", params[0]), params[1]])
    with pytest.raises(ValueError, match="all optimizer param groups should be with/without names"):
        make([{"params": [params[0]]}, {"params": [("p1", params[1])]}])
    with pytest.raises(ValueError, match="weights must be bfloat16 or float32"):
        make([nn.Parameter(torch.ones(2, 64, dtype=torch.complex64))])


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3.0)])
def test_steps_may_be_counted_in_python(step):
    """As in state that older releases of torch have saved."""
    params, others = parameters(), parameters()
    adamw = optim.AdamW(params, lr=0.01)
    train(adamw, params)
    saved = adamw.state_dict()
    for state in saved["state"].values():
        state["step"] = step
    ours = FP8Optimizer(optim.AdamW(others, lr=0.01))
    ours.load_state_dict(saved)
    train(ours, others, 1)
    assert {int(state["step"]) for state in ours.state.values()} == {4}
    assert "m_codes" in ours.state[others[0]]


@every_optimizer
def test_gradients_of_zero_change_nothing_before_the_first_others(make):
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = make(params, weight_decay=0.0)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert same(params, before)
