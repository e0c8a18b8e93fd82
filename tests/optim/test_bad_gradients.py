"""Steps with gradients that are not finite."""

import copy
import pickle

import pytest
import torch
from toy_adamw import assert_same_bits, bits_of, parameters, poison, set_grads, trained

from lightning_fp8.optim import FP8AdamW, finite
from lightning_fp8.optim.finite import all_finite

BAD = [float("nan"), float("inf"), -float("inf"), 2.0**64, -3e38]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_a_bad_step_leaves_no_trace(value, at, masked, rounding, monkeypatch):
    """Bit-equal to a run that never saw it, on the path of CPUs and on the one that asks no device."""
    expected = bits_of(*trained([0, 1, 3], rounding=rounding))
    if masked:
        monkeypatch.setattr(finite, "_FREE_TO_READ", ())
    params = parameters()
    optimizer = FP8AdamW(list(params.items()), lr=0.01, rounding=rounding)
    steps = [0, 1, 3]
    steps.insert(at, 2)
    for step in steps:
        set_grads(params, step)
        if step == 2:
            poison(params, value)
        optimizer.step()
    assert_same_bits(expected, bits_of(params, optimizer))
    assert optimizer.skipped_steps == 1


def test_the_largest_gradient_that_is_taken():
    params = parameters()
    optimizer = FP8AdamW(list(params.items()), lr=0.01)
    set_grads(params, 0)
    poison(params, 2.0**63)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert optimizer.state[params["b.weight"]]["v_max"].isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
def test_raising_after_steps_in_a_row(masked, monkeypatch):
    if masked:
        monkeypatch.setattr(finite, "_FREE_TO_READ", ())
    params = parameters()
    optimizer = FP8AdamW(list(params.items()), max_skipped_steps=3)
    for step, bad in enumerate([True, True, False, True, True]):
        set_grads(params, step)
        if bad:
            poison(params, float("nan"))
        optimizer.step()
    assert optimizer.skipped_steps == 4
    set_grads(params, 9)
    poison(params, float("inf"))
    with pytest.raises(FloatingPointError, match=r"the gradients of 3 steps in a row held NaN, inf or .*2\^63.*Lower"):
        optimizer.step()


def test_copies_count_from_zero():
    params, optimizer = trained(range(2))
    poison(params, float("nan"))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert copy.deepcopy(optimizer).skipped_steps == 0
    assert pickle.loads(pickle.dumps(optimizer)).skipped_steps == 0


def test_all_finite_looks_at_every_gradient():
    grads = [torch.ones(3), torch.zeros(0), torch.ones(2, 2, dtype=torch.bfloat16)]
    assert all_finite(grads)
    assert all_finite([torch.zeros(0)])
    for i in (0, 2):
        for value in (*BAD, -float("nan")):
            bad = [g.clone() for g in grads]
            bad[i].view(-1)[-1] = value
            assert not all_finite(bad), (i, value)


def test_steps_are_counted_in_place():
    """A GPU graph replays what one step did to the memory it used."""
    grads = [torch.tensor([float("nan")])]
    skips = finite.SkippedSteps("test")
    skips.finite(grads, grads, None)
    where = skips._counts.data_ptr()
    for _ in range(3):
        skips.finite(grads, grads, None)
    assert skips.total == 4
    assert skips._counts.data_ptr() == where
