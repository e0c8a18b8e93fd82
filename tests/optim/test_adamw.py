import copy
import io
import math
import pickle

import pytest
import torch

from lightning_fp8.optim import FP8AdamW, packing

SHAPES = {"a.weight": (24, 256), "b.weight": (16, 200), "conv.weight": (4, 16, 3, 3), "norm": (96,), "gate": (5, 8)}
QUANTIZED = ["a.weight", "b.weight", "conv.weight"]


def parameters(dtype=torch.bfloat16, seed=0, shapes=SHAPES):
    gen = torch.Generator().manual_seed(seed)
    return {name: torch.nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for name, s in shapes.items()}


def set_grads(params, step, size=1.0):
    """Gradients that depend on the step and the name only."""
    for name, p in params.items():
        gen = torch.Generator().manual_seed(1000 * step + len(name))
        p.grad = (torch.randn(p.shape, generator=gen) * size).to(p.dtype)


def train(optimizer, params, steps):
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def same_bits(a, b):
    return a.dtype is b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_same(params, optimizer, others, other):
    """Weights and state are equal, bit for bit."""
    for name, p in params.items():
        q = others[name]
        assert same_bits(p.data, q.data), name
        state, other_state = optimizer.state[p], other.state[q]
        assert state.keys() == other_state.keys()
        for key, value in state.items():
            assert same_bits(value.reshape(-1), other_state[key].reshape(-1)), (name, key)


def trained(steps=3, *, dtype=torch.bfloat16, pack=lambda params: list(params.items()), **options):
    params = parameters(dtype)
    optimizer = FP8AdamW(pack(params), **{"lr": 0.01, **options})
    train(optimizer, params, range(steps))
    return params, optimizer


def test_fp32_is_torch_adamw():
    """With fp32 moments and weights only the order of roundings differs from torch's own."""
    params, others = parameters(torch.float32), parameters(torch.float32)
    matrices, vectors = [["a.weight", "b.weight", "conv.weight", "gate"], ["norm"]]
    steps, lr = 20, 3e-3

    def groups(p):
        return [{"params": [p[n] for n in matrices]}, {"params": [p[n] for n in vectors], "weight_decay": 0.0}]

    ours = FP8AdamW(groups(params), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, moments="fp32")
    torchs = torch.optim.AdamW(groups(others), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, foreach=False)
    for step in range(steps):
        for optimizer in (ours, torchs):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps)
                group["betas"] = (0.9, 0.95) if step < 10 else (0.8, 0.99)
        set_grads(params, step)
        set_grads(others, step)
        ours.step()
        torchs.step()
    for name, p in params.items():
        # A step rounds the weight at most three times on either side, each by 2^-24 of it. The terms of m are at most
        # max|g| = 5, each side rounds m thrice a step and m remembers 10 steps: 2 * 3 * 10 * 5 * 2^-24, over sqrt(v),
        # which is 1/4 or more after bias correction but for the first steps of a few elements, where m/sqrt(v) is
        # 1: an update is right to 1200 * 2^-24, with what v and the quotient add, and is multiplied by lr.
        bound = steps * 2.0**-24 * (6 * others[name].abs().max() + 1200 * lr)
        assert (p - others[name]).abs().max() <= bound, name
        assert torch.equal(ours.state[p]["step"], torch.tensor(steps))


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
            }
        else:
            assert state == {"m": (torch.float32, SHAPES[name]), "v": (torch.float32, SHAPES[name])}


def test_bytes_a_parameter():
    p = torch.nn.Parameter(torch.randn(64, 512).bfloat16())
    optimizer = FP8AdamW([p])
    p.grad = torch.randn_like(p)
    optimizer.step()
    moments = sum(value.untyped_storage().nbytes() for value in optimizer.state[p].values()) / p.numel()
    assert moments <= 2.05  # 2 + 6/128 and the step's 8 bytes
    assert moments + (p.untyped_storage().nbytes() + p.grad.untyped_storage().nbytes()) / p.numel() <= 6.1


@pytest.mark.parametrize(("beta2", "rel_l2", "largest"), [(0.95, 0.055, 0.35), (0.999, 0.08, None)])
@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_updates_follow_fp32_moments(beta2, rel_l2, largest, sigma):
    """The bounds are the project's promise, on columns that differ in size by a log-normal factor."""
    gen = torch.Generator().manual_seed(0)
    quantized, exact = (torch.nn.Parameter(torch.zeros(16, 256)) for _ in range(2))
    options = {"lr": 1.0, "betas": (0.9, beta2), "weight_decay": 0.0}
    optimizers = [FP8AdamW([quantized], **options), torch.optim.AdamW([exact], **options)]
    size = (torch.randn(256, generator=gen) * sigma).exp()
    error = total = worst = 0.0
    for _ in range(200):
        quantized.grad = torch.randn(16, 256, generator=gen) * size
        exact.grad = quantized.grad.clone()
        for p, optimizer in zip((quantized, exact), optimizers, strict=True):
            p.data.zero_()  # so that the weight after the step is the update
            optimizer.step()
        difference = (quantized - exact).detach()
        error += difference.square().sum().item()
        total += exact.detach().square().sum().item()
        worst = max(worst, difference.abs().max().item())
    assert math.sqrt(error / total) <= rel_l2
    assert largest is None or worst <= largest


@pytest.mark.parametrize("elements", [1, 300, 2000, 10**6])
def test_chunks_change_nothing(elements, monkeypatch):
    expected = trained()
    monkeypatch.setattr(packing, "_CHUNK_ELEMENTS", {"cpu": elements})
    assert_same(*expected, *trained())


PACKINGS = {
    "reversed": lambda params: list(reversed(params.items())),
    "one group each": lambda params: [{"params": [item]} for item in params.items()],
    "two groups": lambda params: [{"params": list(params.items())[2:]}, {"params": list(params.items())[:2]}],
    "compiled": lambda params: [(f"_orig_mod.{name}", p) for name, p in params.items()],
    "compiled and distributed": lambda params: [(f"module._orig_mod.{name}", p) for name, p in params.items()],
    "checkpointed layers": lambda params: [
        (name.replace(".", "._checkpoint_wrapped_module."), p) for name, p in params.items()
    ],
}


@pytest.mark.parametrize("pack", PACKINGS.values(), ids=PACKINGS)
def test_named_parameters_may_be_packed_in_any_way(pack):
    assert_same(*trained(), *trained(pack=pack))


def test_names_that_end_like_a_wrapper_are_kept():
    """`submodule.` is not the wrapper `module.`: these two weights must not share their random bits."""
    shapes = {"submodule.w": (8, 128), "sub.w": (8, 128), "subw": (8, 128)}
    params = {name: torch.nn.Parameter(torch.ones(shape).bfloat16()) for name, shape in shapes.items()}
    optimizer = FP8AdamW(params.items(), lr=1e-3)
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    weights = list(params.values())
    assert not any(torch.equal(a, b) for a, b in zip(weights, weights[1:] + weights[:1], strict=True))


def test_without_names_the_position_counts():
    expected = trained(pack=lambda params: list(params.values()))
    assert_same(*expected, *trained(pack=lambda params: list(params.values())))
    params, _ = trained(pack=lambda params: list(reversed(params.values())))
    assert not torch.equal(params["a.weight"], expected[0]["a.weight"])


def test_deterministic_and_seeded():
    expected = trained()
    assert_same(*expected, *trained())
    params, _ = trained(seed=1)
    assert not torch.equal(params["a.weight"], expected[0]["a.weight"])


def test_random_bits_change_from_step_to_step():
    p = torch.nn.Parameter(torch.ones(8, 128).bfloat16())
    optimizer = FP8AdamW([p], lr=1e-3, betas=(0.0, 0.0), weight_decay=0.0)
    steps = []
    for _ in range(2):
        p.data.fill_(1.0)
        p.grad = torch.ones_like(p)
        optimizer.step()
        steps.append(p.detach().clone())
    assert not torch.equal(*steps)


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


def test_closure():
    p = torch.nn.Parameter(torch.ones(2, 64))
    optimizer = FP8AdamW([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p * 3).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3 * 128
    assert (p < 1).all()
    assert optimizer.step() is None


def test_parameters_without_gradient_are_left_alone():
    params = parameters()
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer = FP8AdamW(list(params.items()), lr=0.1)
    set_grads(params, 0)
    params["b.weight"].grad = params["norm"].grad = None
    optimizer.step()
    for name, p in params.items():
        skipped = name in ("b.weight", "norm")
        assert torch.equal(p, before[name]) is skipped
        assert (p in optimizer.state) is not skipped


def test_a_parameter_that_joins_late_counts_its_own_steps():
    params = parameters()
    optimizer = FP8AdamW(list(params.items()))
    for step in range(3):
        set_grads(params, step)
        if step < 2:
            params["b.weight"].grad = None
        optimizer.step()
    assert {name: optimizer.state[p]["step"].item() for name, p in params.items()} == {
        name: 1 if name == "b.weight" else 3 for name in params
    }
    # Packed with older parameters it has its own bias correction and random bits: those of a first step alone.
    alone = {"b.weight": parameters()["b.weight"]}
    other = FP8AdamW(list(alone.items()))
    train(other, alone, [2])
    assert same_bits(params["b.weight"].data, alone["b.weight"].data)


@pytest.mark.parametrize("shape", [(0,), (0, 128), (4, 0)])
def test_an_empty_parameter_is_no_error(shape):
    params = parameters(shapes={"empty": shape, "a": (4, 128)})
    optimizer = FP8AdamW(list(params.items()))
    train(optimizer, params, range(2))
    assert optimizer.state[params["a"]]["step"] == 2


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


def test_stochastic_rounding_makes_progress_where_nearest_does_not():
    steps, lr = 100, 1e-5
    moved = {}
    for rounding in ("stochastic", "nearest"):
        p = torch.nn.Parameter(torch.ones(64, 256).bfloat16())
        optimizer = FP8AdamW([("w", p)], lr=lr, weight_decay=0.0, rounding=rounding)
        for _ in range(steps):
            p.grad = torch.ones_like(p)  # u = 1 in each step, to FP8's error
            optimizer.step()
        moved[rounding] = 1 - p.double().mean().item()
    assert moved["nearest"] == 0
    # Below 1 an ulp is 2^-8: each element makes a number of steps of that size, whose variance is steps * lr ulp or
    # less. Five standard deviations of the mean of 2^14 elements; gradients of one size have no quantisation error
    # beyond half a step of m's code, 2 %.
    deviation = math.sqrt(steps * lr * 2.0**-8 / p.numel())
    assert abs(moved["stochastic"] - steps * lr) < 5 * deviation + 0.02 * steps * lr


def test_a_learning_rate_may_be_a_tensor():
    expected = trained(dtype=torch.float32)
    params, optimizer = trained(dtype=torch.float32, lr=torch.tensor(0.01))
    for name, p in params.items():
        # lr and 1 - lr * weight_decay are rounded to fp32 before they are used, and the result once more, each step.
        torch.testing.assert_close(p, expected[0][name], rtol=0, atol=3 * 4 * 2.0**-24 * p.abs().max().item())
        assert optimizer.state[p]["step"] == 3


def test_the_gradient_may_have_any_layout():
    params, others = parameters(), parameters()
    optimizers = [FP8AdamW(list(p.items())) for p in (params, others)]
    set_grads(params, 0)
    set_grads(others, 0)
    others["a.weight"].grad = others["a.weight"].grad.t().contiguous().t()
    for optimizer in optimizers:
        optimizer.step()
    assert_same(params, optimizers[0], others, optimizers[1])


def test_gradients_whose_squares_underflow():
    """Their v is 0 while m is not: what is stored of m must then be 0, and the weights stay finite."""
    params = parameters(torch.float32)
    optimizer = FP8AdamW(list(params.items()), weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in params.items()}
    for step in range(5):
        set_grads(params, step, size=1e-24)
        optimizer.step()
    for name, p in params.items():
        torch.testing.assert_close(p, before[name], rtol=0, atol=1e-6)  # lr * |g| / eps = 1e-19 a step, and rounding
    assert not (optimizer.state[params["a.weight"]]["m_codes"] & 0x7F).any()


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


@pytest.mark.parametrize("block_size", [32, 100, 256])
def test_block_size(block_size):
    params, optimizer = trained(block_size=block_size)
    assert optimizer.state[params["a.weight"]]["v_max"].shape == (24, math.ceil(256 / block_size))


ERRORS = [  # argument, value, what the message must hold: field, value and remedy
    ("lr", -1.0, r"lr is -1\.0; it must be 0 or more"),
    ("lr", float("nan"), r"lr is nan; it must be 0 or more"),
    ("eps", -1e-8, r"eps is -1e-08; it must be 0 or more"),
    ("weight_decay", -0.1, r"weight_decay is -0\.1; it must be 0 or more"),
    ("betas", (1.0, 0.9), r"betas are \(1\.0, 0\.9\); both must be in \[0, 1\)"),
    ("betas", (0.9, -0.1), r"betas are \(0\.9, -0\.1\); both must be in \[0, 1\)"),
    ("block_size", 0, r"block_size is 0; it must be 1 or more"),
    ("clip_update_rms", 0.0, r"clip_update_rms is 0\.0; it must be more than 0, or None"),
    ("max_update", -1.0, r"max_update is -1\.0; it must be more than 0, or None"),
    ("max_skipped_steps", 0, r"max_skipped_steps is 0; it must be more than 0, or None"),
    ("moments", "fp16", r"moments 'fp16' is not one of fp8, e4m3, e4m3/e5m2, coat, bf16, fp32, fp8_lm"),
    ("rounding", "up", r"rounding 'up' is not one of stochastic, nearest, kahan, correction8, scaled_fp16"),
]


@pytest.mark.parametrize(("name", "value", "message"), ERRORS)
def test_bad_arguments(name, value, message):
    p = torch.nn.Parameter(torch.ones(2, 64))
    with pytest.raises(ValueError, match=rf"^FP8AdamW: {message}\.$"):
        FP8AdamW([p], **{name: value})
    with pytest.raises(ValueError, match=message):
        FP8AdamW([{"params": [p], name: value}])


PARAMETER_ERRORS = [
    (torch.ones(2, 64, dtype=torch.float16), r"a parameter is torch\.float16; weights must be bfloat16 or float32"),
    (torch.ones(64, 2).t(), r"a parameter of shape \(2, 64\) is not contiguous; make it so first"),
]


@pytest.mark.parametrize(("value", "message"), PARAMETER_ERRORS)
def test_bad_parameters(value, message):
    with pytest.raises(ValueError, match=rf"^FP8AdamW: {message}\.$"):
        FP8AdamW([torch.nn.Parameter(value)])
