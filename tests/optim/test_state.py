import pytest
import torch

from lightning_fp8.optim import FP8AdamW


def trained():
    p = torch.nn.Parameter(torch.randn(8, 256, generator=torch.Generator().manual_seed(0)).bfloat16())
    optimizer = FP8AdamW([("w", p)], lr=0.25)
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    optimizer.step()
    return p, optimizer


def test_hooks_see_the_state_as_it_is_saved_and_as_it_is_loaded():
    p, optimizer = trained()
    seen = []

    def before(_, state_dict):
        seen.append(state_dict["state"][0]["m_codes"].dtype)
        changed = {**state_dict["state"][0], "step": torch.tensor(41)}
        return {**state_dict, "state": {0: changed}}

    def after(loaded):
        seen.append(loaded.state[p]["m_codes"].dtype)
        loaded.state[p]["step"] += 1

    state = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after)
    for _ in range(2):  # nothing of the first call is left for the second
        optimizer.load_state_dict(state)
        assert optimizer.state[p]["step"] == 42
    assert seen == [torch.uint8] * 4
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == 1


def test_a_hyperparameter_that_was_not_saved_keeps_its_value():
    p, optimizer = trained()
    state = optimizer.state_dict()
    del state["param_groups"][0]["block_size"]
    other = FP8AdamW([p], lr=1.0, block_size=128)
    other.load_state_dict(state)
    assert (other.param_groups[0]["lr"], other.param_groups[0]["block_size"]) == (0.25, 128)


def test_state_of_parameters_that_were_never_stepped_stays_away():
    p, optimizer = trained()
    params = [p, torch.nn.Parameter(torch.zeros(4, 128))]
    partial = optimizer.state_dict()
    partial["param_groups"][0]["params"] = [0, 1]
    other = FP8AdamW(params)
    other.load_state_dict(partial)
    assert set(other.state) == {p}


def test_a_failed_load_leaves_no_hook_behind():
    _, optimizer = trained()
    state = optimizer.state_dict()
    state["param_groups"][0]["params"] = [0, 1]
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(state)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


def test_allocate_is_what_a_first_step_finds():
    p, optimizer = trained()
    other = torch.nn.Parameter(torch.randn(8, 256, generator=torch.Generator().manual_seed(0)).bfloat16())
    allocated = FP8AdamW([("w", other)], lr=0.25)
    allocated.allocate()
    shapes = {key: (value.shape, value.dtype) for key, value in allocated.state[other].items()}
    assert shapes == {key: (value.shape, value.dtype) for key, value in optimizer.state[p].items()}
    assert allocated.state[other]["step"] == 0
    other.grad = p.grad
    allocated.step()
    allocated.allocate()  # once is enough
    assert torch.equal(p, other)
    assert all(torch.equal(value, allocated.state[other][key]) for key, value in optimizer.state[p].items())
