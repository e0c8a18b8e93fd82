import math

import pytest
import torch

from lightning_fp8.optim import FP8AdamW, export_fp32_state, import_adamw_state, interchange

SHAPES = {"a": (24, 256), "ragged": (16, 200), "conv": (4, 16, 3, 3), "norm": (96,), "empty": (0, 128)}
OPTIONS = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}


def parameters(dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for name, s in SHAPES.items()}


def train(optimizer, params, steps):
    for step in steps:
        for name, p in params.items():
            gen = torch.Generator().manual_seed(1000 * step + len(name))
            p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)
        optimizer.step()


def trained(kind, dtype=torch.float32, **options):
    params = parameters(dtype)
    optimizer = kind(params.items(), **OPTIONS, **options)
    train(optimizer, params, range(5))
    return params, optimizer


def test_adamw_state_is_taken_over():
    """Moments are right to the codec's steps; step counts and hyperparameters exactly."""
    params, torchs = trained(torch.optim.AdamW)
    ours = FP8AdamW(params.items(), lr=9.0, block_size=64)
    import_adamw_state(ours, torchs.state_dict())
    assert {name: ours.param_groups[0][name] for name in OPTIONS} == OPTIONS
    assert ours.param_groups[0]["block_size"] == 64
    back = export_fp32_state(ours)["state"]
    for number, (name, p) in enumerate(params.items()):
        exact, state = torchs.state[p], back[number]
        assert ours.state[p]["step"].dtype is torch.int64
        assert state["step"] == exact["step"] == 5
        if name in ("norm", "empty"):
            assert torch.equal(state["exp_avg"], exact["exp_avg"])
            assert torch.equal(state["exp_avg_sq"], exact["exp_avg_sq"])
            continue
        v, v_back = exact["exp_avg_sq"], state["exp_avg_sq"]
        # To nearest: half of a code. The byte of the density has 3 mantissa bits; 0 is 4 codes an octave.
        byte = ours.state[p]["v_density"].min().int()
        per_octave = (1 + (byte & 7) / 8) * 4 * 2.0 ** (byte >> 3)
        assert (v_back / v).log2().abs().max() <= 0.5 / per_octave * 1.001 + 1e-6
        # E4M3 after a power of 2.5: an error of 2^-4 / 2.5 of |r|, or below 2^-6 / 448 of the range, half the distance
        # of its subnormals; r is m over the decoded sqrt(v), and its scale at most twice the block's largest r.
        r, r_back = exact["exp_avg"] / v_back.sqrt(), state["exp_avg"] / v_back.sqrt()
        floor = (2.0**-10 / 448) ** 0.4 * 2 * r.abs().max()
        assert ((r - r_back).abs() <= r.abs() * (2.0**-4 / 2.5) * 1.1 + floor).all()


def test_an_imported_run_goes_on_like_the_original():
    params, torchs = trained(torch.optim.AdamW)
    others = {name: torch.nn.Parameter(p.detach().clone()) for name, p in params.items()}
    ours = FP8AdamW(others.items())
    import_adamw_state(ours, torchs.state_dict())
    before = {name: p.detach().clone() for name, p in params.items()}
    train(torchs, params, range(5, 8))
    train(ours, others, range(5, 8))
    error = total = 0.0
    for name, p in params.items():
        error += (others[name] - p).square().sum().item()
        total += (p - before[name]).square().sum().item()
    assert math.sqrt(error / total) < 0.055  # the promise for the update's error at beta2 = .95


@pytest.mark.parametrize("moments", ["fp8", "fp32"])
def test_exported_state_is_what_the_codes_stand_for(moments, monkeypatch):
    """Loaded by torch's AdamW it gives the same next step, to the roundings of fp32."""
    monkeypatch.setattr(interchange, "_CHUNK_ELEMENTS", 1000)
    params, ours = trained(FP8AdamW, moments=moments)
    others = {name: torch.nn.Parameter(p.detach().clone()) for name, p in params.items()}
    torchs = torch.optim.AdamW(others.items(), lr=9.0)
    exported = export_fp32_state(ours)
    torchs.load_state_dict(exported)
    assert {name: torchs.param_groups[0][name] for name in OPTIONS} == OPTIONS
    assert {v.dtype for state in exported["state"].values() for v in state.values()} == {torch.float32}
    train(ours, params, [5])
    train(torchs, others, [5])
    for name, p in params.items():
        torch.testing.assert_close(p, others[name], rtol=0, atol=2.0**-22 * 4)  # weights to 4, updates of lr


def test_fp32_moments_pass_through_unchanged():
    params, ours = trained(FP8AdamW, moments="fp32")
    other = FP8AdamW(params.items(), moments="fp32")
    import_adamw_state(other, export_fp32_state(ours))
    for p in params.values():
        assert all(torch.equal(value, other.state[p][key]) for key, value in ours.state[p].items())


def test_names_may_be_the_keys():
    params, torchs = trained(torch.optim.AdamW)
    state = torchs.state_dict()
    names = list(params)
    named = {
        "state": {names[key]: value for key, value in state["state"].items()},
        "param_groups": [{**state["param_groups"][0], "params": names}],
    }
    optimizers = [FP8AdamW(params.items()) for _ in range(2)]
    for optimizer, saved in zip(optimizers, (state, named), strict=True):
        import_adamw_state(optimizer, saved)
    for p in params.values():
        assert all(torch.equal(v, optimizers[1].state[p][k]) for k, v in optimizers[0].state[p].items())


def test_loading_it_directly_says_what_to_call():
    params, torchs = trained(torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"state of torch\.optim\.AdamW.*import_adamw_state"):
        FP8AdamW(params.items()).load_state_dict(torchs.state_dict())


def test_what_cannot_be_imported():
    params, torchs = trained(torch.optim.AdamW, amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad=True"):
        import_adamw_state(FP8AdamW(params.items()), torchs.state_dict())
    params, torchs = trained(torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"groups of \[5\] parameters.*groups of \[4\]"):
        import_adamw_state(FP8AdamW(list(params.values())[1:]), torchs.state_dict())
    with pytest.raises(ValueError, match=r"exp_avg of shape \(24, 256\) for a parameter of shape \(0, 128\)"):
        import_adamw_state(FP8AdamW(list(params.values())[::-1]), torchs.state_dict())
