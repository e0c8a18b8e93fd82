import dataclasses
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformer_engine_on_cpu import cpu_taken_for_gpu, gemms

from lightning_fp8.compute import PRESETS, Operand, Recipe, convert_to_transformer_engine, transformer_engine_autocast
from lightning_fp8.compute.recipe import GEMMS, ROLES, resolve_recipe
from lightning_fp8.compute.transformer_engine.recipe import require_transformer_engine, transformer_engine_recipe

POWER = Operand(power_of_two=True)
E4M3, E5M2 = 7, 8  # as Transformer Engine numbers them
CLASSES = {
    "tensorwise": "Float8CurrentScaling",
    "delayed": "DelayedScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}


def quantizers(recipe):
    """The quantizers that a layer of Transformer Engine's gets under `recipe`, by the role of the operand."""
    layer = nn.Linear(32, 32)
    convert_to_transformer_engine(layer, recipe)
    with transformer_engine_autocast(recipe):
        layer.init_fp8_metadata()
    forward, backward = layer.quantizers["scaling_fwd"], layer.quantizers["scaling_bwd"]
    return dict(zip(ROLES, (forward[0], forward[1], backward[0]), strict=True))


@pytest.mark.parametrize("preset", CLASSES)
def test_a_preset_becomes_the_recipe_of_its_kind(te, preset):
    made = transformer_engine_recipe(PRESETS[preset])
    assert type(made).__name__ == CLASSES[preset]
    assert made.backward_override is None
    assert transformer_engine_recipe(resolve_recipe({"preset": preset})) is made


@pytest.mark.parametrize(
    "recipe",
    [
        *(PRESETS[name] for name in CLASSES),
        Recipe(grad_output=Operand(), scaling="delayed", history=3, amax="most_recent", margin=2),
        dataclasses.replace(PRESETS["mxfp8"], grad_output=Operand("e5m2", "mx_1x32", power_of_two=True)),
    ],
)
def test_every_argument_is_one_that_transformer_engine_knows(te, monkeypatch, recipe):
    from transformer_engine.common import recipe as theirs

    given = {}
    for name in CLASSES.values():
        cls = getattr(theirs, name)

        def make(cls=cls, **arguments):
            given[cls] = arguments
            return cls(**arguments)

        monkeypatch.setattr(theirs, name, make)
    made = transformer_engine_recipe.__wrapped__(recipe)
    ((cls, arguments),) = given.items()
    assert arguments.keys() <= {field.name for field in dataclasses.fields(cls)}  # it ignores others silently
    assert all(getattr(made, name) == value for name, value in arguments.items())


@pytest.mark.parametrize("preset", CLASSES)
@pytest.mark.parametrize(("format", "code"), [("e4m3", E4M3), ("e5m2", E5M2)])
def test_formats_reach_the_quantizers(te, preset, format, code):
    base = PRESETS[preset]
    made = quantizers(dataclasses.replace(base, grad_output=dataclasses.replace(base.grad_output, format=format)))
    assert [int(quantizer.dtype) for quantizer in made.values()] == [E4M3, E4M3, code]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("preset", ["tensorwise", "blockwise"])
def test_powers_of_two_reach_the_quantizer_of_their_operand_only(te, preset, role):
    base = PRESETS[preset]
    recipe = dataclasses.replace(base, **{role: dataclasses.replace(base.operand(role), power_of_two=True)})
    assert {name for name, quantizer in quantizers(recipe).items() if quantizer.force_pow_2_scales} == {role}
    assert not any(quantizer.force_pow_2_scales for quantizer in quantizers(base).values())


@pytest.mark.parametrize(("granularity", "dimensions"), [("block_1x128", 1), ("block_128x128", 2)])
def test_blocks_have_the_dimensions_asked_for(te, granularity, dimensions):
    made = quantizers(dataclasses.replace(PRESETS["blockwise"], weight=Operand(granularity=granularity)))
    assert [made[role].block_scaling_dim for role in ROLES] == [1, dimensions, 1]


def test_delayed_scaling_takes_over_history_amax_and_margin(te):
    made = transformer_engine_recipe(Recipe(scaling="delayed", history=5, amax="most_recent", margin=3))
    assert (made.amax_history_len, made.amax_compute_algo, made.margin) == (5, "most_recent", 3)
    assert made.reduce_amax
    assert made.fp8_format.name == "HYBRID"


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(fast_accumulation=()),
        Recipe(fast_accumulation=("input_grad",)),
        Recipe(fast_accumulation=GEMMS),
        Recipe(scaling="delayed"),
    ],
)
def test_gemms_may_be_fast_where_the_recipe_lets_them(te, recipe):
    layer = nn.Linear(32, 48, bias=False)
    convert_to_transformer_engine(layer, recipe)
    with transformer_engine_autocast(recipe):
        y = layer(torch.randn(16, 32, requires_grad=True))
    y.sum().backward()
    exact = {gemm.layout: gemm.split_accumulator for gemm in gemms}
    fast = [name for name, layout in zip(GEMMS, ("TN", "NN", "NT"), strict=True) if not exact[layout]]
    assert tuple(fast) == recipe.fast_accumulation
    assert all(gemm.fp8_operands == 2 for gemm in gemms)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("rowwise", "no scales by row"),
        ("rowwise_gw_hp", "no scales by row"),
        ({"high_precision": ["weight_grad"]}, "cannot keep single GEMMs in high precision, here weight_grad"),
        (Recipe(weight=Operand("e5m2"), grad_output=Operand()), "inputs and weights are always e4m3"),
        (Recipe(weight=POWER, scaling="delayed"), "no power-of-two scales, and power_of_two is set for weight"),
        (Recipe(scaling="delayed", fast_accumulation=()), "always asks for fast accumulation in the forward GEMM"),
    ],
)
def test_what_transformer_engine_lacks_is_refused_with_what_it_has(recipe, words):
    with pytest.raises(ValueError, match=words) as error:
        require_transformer_engine(resolve_recipe(recipe))
    assert "has tensorwise, delayed, blockwise and mxfp8" in str(error.value)
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize(
    ("capability", "presets"),
    [((8, 0), []), ((9, 0), ["tensorwise", "delayed", "blockwise"]), ((10, 0), list(CLASSES))],
)
def test_transformer_engine_is_asked_what_the_device_can_do(python_layer, capability, presets):
    with cpu_taken_for_gpu(capability):
        for preset in CLASSES:
            refused = pytest.raises(ValueError, match=r"cannot run here: .* compute capability")
            with nullcontext() if preset in presets else refused:
                require_transformer_engine(PRESETS[preset])


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in CLASSES])
def test_presets_are_mapped_or_refused(preset):
    with pytest.raises(ValueError, match="FP8 backend 'transformer_engine'"):
        transformer_engine_recipe(PRESETS[preset])
