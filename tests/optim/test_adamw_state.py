"""What `FP8AdamW` keeps of each parameter, and that a run goes on from it bit for bit."""

import copy
import io
import math
import pickle

import pytest
import torch
from toy_adamw import (
    QUANTIZED,
    SHAPES,
    assert_same,
    assert_same_bits,
    bits_of,
    parameters,
    same_bits,
    set_grads,
    train,
    trained,
)

from lightning_fp8.numerics.weights import BF16_WEIGHTS
from lightning_fp8.optim import FP8AdamW
from lightning_fp8.optim.step import MOMENTS


def test_state_is_as_documented():
    params, optimizer = trained(1)
    fp8 = {
        "a.weight": ((24, 256), (24, 2)),
        "b.weight": ((16, 200), (16, 2)),
        "conv.weight": ((4, 16, 3, 3), (4, 2)),
    }
    for name, p in params.items():
        state = {key: (value.dtype, tuple(value.shape)) for key, value in optimizer.state[p].items()}
        assert state.pop("step") == (torch.int64, ())
        if name in QUANTIZED:
            codes, scales = fp8[name]
            assert state == {
                "m_codes": (torch.uint8, codes),
                "v_codes": (torch.uint8, codes),
                "m_scale": (torch.uint8, scales),
                "v_max": (torch.float32, scales),
                "v_density": (torch.uint8, scales),
                "v_split": (torch.uint8, scales),
                "v_gap": (torch.uint8, scales),
            }
        else:
            assert state == {"m": (torch.float32, SHAPES[name]), "v": (torch.float32, SHAPES[name])}


def test_bytes_a_parameter():
    p = torch.nn.Parameter(torch.randn(64, 512).bfloat16())
    optimizer = FP8AdamW([p])
    p.grad = torch.randn_like(p)
    optimizer.step()
    moments = sum(value.untyped_storage().nbytes() for value in optimizer.state[p].values()) / p.numel()
    assert moments <= 2.064  # 2 + 8/128 and the step's 8 bytes
    assert moments + (p.untyped_storage().nbytes() + p.grad.untyped_storage().nbytes()) / p.numel() <= 6.1


BYTES = {
    "fp8": 2 + 8 / 128,
    "e4m3": 2 + 8 / 128,
    "e4m3/e5m2": 2 + 8 / 128,
    "coat": 2 + 24 / 128,
    "fp8_lm": 3 + 8 / 128,
    "bf16": 4,
    "fp32": 8,
}
EXTRA = {"stochastic": 0, "nearest": 0, "kahan": 2, "correction8": 1, "scaled_fp16": 2 + 1 / 128}


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize(("rounding", "extra"), EXTRA.items())
def test_every_format_has_its_bytes(moments, rounding, extra):
    p = torch.nn.Parameter(torch.ones(64, 512).bfloat16())
    optimizer = FP8AdamW([p], moments=moments, rounding=rounding)
    p.grad = torch.ones_like(p)
    optimizer.step()
    stored = sum(t.untyped_storage().nbytes() for name, t in optimizer.state[p].items() if name != "step")
    assert stored / p.numel() == BYTES[moments] + extra


@pytest.mark.parametrize("block_size", [32, 100, 256])
def test_block_size(block_size):
    params, optimizer = trained(block_size=block_size)
    assert optimizer.state[params["a.weight"]]["v_max"].shape == (24, math.ceil(256 / block_size))


def test_groups_may_differ_in_moments():
    params = parameters()
    groups = [
        {"params": [("a.weight", params["a.weight"])], "moments": "fp32"},
        {"params": [("b.weight", params["b.weight"])]},
    ]
    optimizer = FP8AdamW(groups)
    train(optimizer, {name: params[name] for name in ("a.weight", "b.weight")}, range(2))
    assert optimizer.state[params["a.weight"]].keys() == {"step", "m", "v"}
    assert "m_codes" in optimizer.state[params["b.weight"]]


def test_embeddings_may_have_moments_of_their_own():
    params = parameters()
    groups = [
        {"params": [("a.weight", params["a.weight"])], "moments": "fp32"},
        {"params": [(name, params[name]) for name in ("b.weight", "norm")]},
    ]
    optimizer = FP8AdamW(groups)
    set_grads(params, 0)
    optimizer.step()
    assert optimizer.state[params["a.weight"]]["v"].dtype is torch.float32
    assert optimizer.state[params["b.weight"]]["v_codes"].dtype is torch.uint8


def through_torch_save(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES = {
    "itself": lambda state: state,
    "torch.save": through_torch_save,
    "deepcopy": copy.deepcopy,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("moments", ["fp8", "fp32"])
def test_a_resumed_run_is_the_uninterrupted_one(copied, moments):
    params, optimizer = trained(4, moments=moments)
    others = parameters(seed=9)
    for name, p in params.items():
        others[name].data.copy_(p)
    resumed = FP8AdamW(list(others.items()), lr=0.5, moments=moments)
    resumed.load_state_dict(copied(optimizer.state_dict()))
    assert_same(params, optimizer, others, resumed)
    # Nothing is shared, or the run that goes on would change the state that was saved.
    assert not any(
        value.data_ptr() == optimizer.state[params[name]][key].data_ptr()
        for name, p in others.items()
        for key, value in resumed.state[p].items()
    )
    train(optimizer, params, range(4, 9))
    train(resumed, others, range(4, 9))
    assert_same(params, optimizer, others, resumed)


@pytest.mark.parametrize("copied", [COPIES["deepcopy"], COPIES["pickle"]], ids=["deepcopy", "pickle"])
def test_a_copied_optimizer_steps_alike(copied):
    params, optimizer = trained()
    others, other = copied((params, optimizer))
    train(optimizer, params, range(3, 6))
    train(other, others, range(3, 6))
    assert_same(params, optimizer, others, other)
    # ... and a copy still loads codes as codes.
    other.load_state_dict(optimizer.state_dict())
    assert_same(params, optimizer, others, other)


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("rounding", BF16_WEIGHTS)
def test_every_format_trains_and_resumes(moments, rounding):
    options = {"moments": moments, "rounding": rounding}
    params, optimizer = trained(range(3), **options)
    others = parameters(seed=9)
    for name, p in params.items():
        others[name].data.copy_(p)
    resumed = FP8AdamW(list(others.items()), lr=0.5, **options)
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    for step in range(3, 5):
        for ps, opt in ((params, optimizer), (others, resumed)):
            set_grads(ps, step)
            opt.step()
    assert_same_bits(bits_of(params, optimizer), bits_of(others, resumed))
    assert all(p.isfinite().all() for p in params.values())


@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_step_of_nothing_leaves_the_weights(steps_before):
    """How a checkpoint's template is made: state must come to be, and no weight may change."""
    params, optimizer = trained(steps_before)
    before = {name: p.detach().clone() for name, p in params.items()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(same_bits(p.data, before[name]) for name, p in params.items())
    assert all({"m_codes", "v_codes"} <= optimizer.state[params[name]].keys() for name in QUANTIZED)
