"""That a parameter's step does not depend on which others are stepped with it, nor in what order."""

import pytest
import torch
from toy_adamw import assert_same, parameters, same_bits, set_grads, train, trained

from lightning_fp8.optim import FP8AdamW, packing


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
