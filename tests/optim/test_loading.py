"""State that was kept in another way: what loading it says, and how it is converted."""

import copy

import pytest
import torch
from toy_adamw import QUANTIZED, parameters, train, trained

from lightning_fp8.numerics.weights import BF16_WEIGHTS
from lightning_fp8.optim import FP8AdamW, FP8Optimizer, convert_state, export_fp32_state, import_adamw_state
from lightning_fp8.optim.step import MOMENTS

OTHER = [("moments", "fp32"), ("moments", "e4m3"), ("block_size", 64), ("rounding", "kahan")]


def wrapped(base=torch.optim.AdamW, steps=3, params=None, **options):
    params = params or parameters()
    optimizer = FP8Optimizer(base(params.items(), lr=0.01), **options)
    train(optimizer, params, range(steps))
    return params, optimizer


@pytest.mark.parametrize(("option", "value"), OTHER)
def test_other_options_are_an_error_that_names_both_and_the_cure(option, value):
    params, optimizer = trained()
    saved = optimizer.state_dict()
    own = optimizer.param_groups[0][option]
    other = FP8AdamW(params.items(), **{option: value})
    message = (
        rf"^FP8AdamW: parameter group 0 was saved with {option}={own!r}, and this optimizer has {option}={value!r}\. "
        r"Build it with what was saved, or load with lightning_fp8\.optim\.convert_state\(optimizer, state_dict\)\.$"
    )
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)
    assert not other.state  # nothing is half loaded
    assert other.param_groups[0]["lr"] == 1e-3


def test_of_a_wrapped_optimizer_too():
    params, optimizer = wrapped()
    with pytest.raises(ValueError, match=r"^FP8Optimizer: .* saved with moments='fp8', block_size=128, and this .*=64"):
        FP8Optimizer(torch.optim.AdamW(params.items()), "fp32", block_size=64).load_state_dict(optimizer.state_dict())


def older(state_dict, *, lost, kept=None):
    """As a release would have written it whose field had another name."""
    state = copy.deepcopy(state_dict)
    for fields in state["state"].values():
        if lost in fields:
            value = fields.pop(lost)
            if kept:
                fields[kept] = value
    return state


@pytest.mark.parametrize("lost", ["m_codes", "m_scale", "v_codes", "v_max", "v_density", "v_split", "v_gap"])
def test_fields_of_another_release_are_named_with_their_parameter(lost):
    params, optimizer = trained()
    message = rf"^FP8AdamW: the saved state of 'a\.weight' lacks {lost}; it has step, .*old_name\. It is of another .*"
    with pytest.raises(ValueError, match=message + r"export_fp32_state"):
        FP8AdamW(params.items()).load_state_dict(older(optimizer.state_dict(), lost=lost, kept="old_name"))
    params, optimizer = wrapped()
    with pytest.raises(ValueError, match=message.replace("FP8AdamW", "FP8Optimizer")):
        wrapped(steps=0)[1].load_state_dict(older(optimizer.state_dict(), lost=lost, kept="old_name"))


def test_a_lost_step_or_vector_is_seen():
    params, optimizer = trained()
    for lost, name in (("step", "a.weight"), ("v", "norm")):
        with pytest.raises(ValueError, match=rf"saved state of '{name}' lacks {lost};"):
            FP8AdamW(params.items()).load_state_dict(older(optimizer.state_dict(), lost=lost))


def test_state_of_another_base_is_refused():
    """Adam's moments mean nothing to SGD's momentum, in codes and in fp32."""
    params, optimizer = wrapped(torch.optim.AdamW)
    sgd = FP8Optimizer(torch.optim.SGD(params.items(), lr=0.01, momentum=0.9))
    for state in (optimizer.state_dict(), optimizer.base_state_dict()):
        with pytest.raises(ValueError, match=r"^FP8Optimizer: the saved state of 'a\.weight' lacks momentum_buffer;"):
            sgd.load_state_dict(state)


def relative_error(a, b):
    return float((a.detach().double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("before", ["fp8", "e4m3", "fp32"])
def test_moments_are_converted(before, moments):
    """Exactly where fp32 takes them over; else as if they had been imported from fp32."""
    params, optimizer = trained(moments=before, block_size=64)
    saved, exact = copy.deepcopy(optimizer.state_dict()), export_fp32_state(optimizer)
    other, imported = (FP8AdamW(parameters().items(), lr=0.5, moments=moments) for _ in range(2))
    convert_state(other, saved)
    import_adamw_state(imported, exact)
    for p, q in zip(other.param_groups[0]["params"], imported.param_groups[0]["params"], strict=True):
        assert all(torch.equal(value, imported.state[q][key]) for key, value in other.state[p].items())
        assert other.state[p]["step"] == 3
    assert (other.param_groups[0]["lr"], other.param_groups[0]["moments"]) == (0.01, moments)
    assert other.param_groups[0]["block_size"] == 128
    if moments == "fp32":
        for number, state in export_fp32_state(other)["state"].items():
            assert all(torch.equal(value, exact["state"][number][key]) for key, value in state.items())
    train(other, dict(zip(params, other.param_groups[0]["params"], strict=True)), [3])


@pytest.mark.parametrize("rounding", BF16_WEIGHTS)
def test_roundings_are_converted(rounding):
    params, optimizer = trained(rounding="kahan")
    before = {name: p.detach().clone() for name, p in params.items()}
    other = FP8AdamW(params.items(), rounding=rounding)
    convert_state(other, optimizer.state_dict())
    assert all(torch.equal(p, before[name]) for name, p in params.items())
    train(other, params, [3])


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.Adagrad])
def test_wrapped_state_is_converted(base):
    params, optimizer = wrapped(base)
    exact = optimizer.base_state_dict()
    others = {name: torch.nn.Parameter(p.detach().clone()) for name, p in params.items()}
    _, other = wrapped(base, 0, others, moments="fp32")
    convert_state(other, optimizer.state_dict())
    for number, state in other.base_state_dict()["state"].items():
        assert all(torch.equal(value, exact["state"][number][key]) for key, value in state.items())
    train(other, others, [3])
    assert other.state[others[QUANTIZED[0]]]["step"] == 4


def test_an_optimizer_goes_on_from_converted_state_as_from_its_own():
    """fp32 to fp8 in mid-run: the next update is that of fp32 moments to the error of one rounding, 5.5 %."""
    params, optimizer = trained(moments="fp32", dtype=torch.float32, rounding="nearest")
    others = {name: torch.nn.Parameter(p.detach().clone()) for name, p in params.items()}
    start = {name: p.detach().clone() for name, p in params.items()}
    other = FP8AdamW(others.items(), rounding="nearest")
    convert_state(other, optimizer.state_dict())
    train(optimizer, params, [3])
    train(other, others, [3])
    for name, p in params.items():
        assert relative_error(others[name] - start[name], p - start[name]) <= 0.055, name
