import dataclasses

import pytest

from lightning_fp8.compute import PRESETS, Operand, Recipe
from lightning_fp8.compute.recipe import resolve_recipe


def test_the_default_recipe_is_tensorwise():
    recipe = resolve_recipe("tensorwise")
    assert recipe == Recipe() == PRESETS["tensorwise"]
    assert [o.format for o in (recipe.input, recipe.weight, recipe.grad_output)] == ["e4m3", "e4m3", "e5m2"]


def test_presets_by_row_are_e4m3_with_power_of_two_scales():
    rowwise, accurate = PRESETS["rowwise"], PRESETS["rowwise_gw_hp"]
    assert rowwise.input == rowwise.weight == rowwise.grad_output == Operand("e4m3", "row", power_of_two=True)
    assert accurate == dataclasses.replace(rowwise, high_precision=("weight_grad",))


def test_presets_by_block():
    blockwise, mx = PRESETS["blockwise"], PRESETS["mxfp8"]
    assert [o.granularity for o in (blockwise.input, blockwise.weight, blockwise.grad_output)] == [
        "block_1x128",
        "block_128x128",
        "block_1x128",
    ]
    assert mx.input == mx.weight == mx.grad_output == Operand("e4m3", "mx_1x32", power_of_two=True)


def test_the_delayed_preset_is_tensorwise_with_scales_known_beforehand():
    assert (
        PRESETS["delayed"] == Recipe(scaling="delayed") == Recipe(scaling="delayed", history=16, amax="max", margin=0)
    )
    assert dataclasses.replace(PRESETS["delayed"], scaling="current") == PRESETS["tensorwise"]


def test_delayed_scaling_is_set_up_from_a_mapping():
    recipe = resolve_recipe({"preset": "delayed", "history": 4, "amax": "most_recent", "margin": 2})
    assert recipe == Recipe(scaling="delayed", history=4, amax="most_recent", margin=2)
    assert resolve_recipe({"scaling": "delayed", "history": 4}) == resolve_recipe({"preset": "delayed", "history": 4})


def test_fast_accumulation_is_for_the_forward_product_unless_asked_for():
    assert all(recipe.fast_accumulation == ("forward",) for recipe in PRESETS.values())
    assert resolve_recipe({"fast_accumulation": []}).fast_accumulation == ()
    assert resolve_recipe({"fast_accumulation": ["input_grad"]}).fast_accumulation == ("input_grad",)


def test_both_operands_may_be_e5m2_in_a_product_that_is_not_run_in_fp8():
    recipe = Recipe(input=Operand("e5m2"), high_precision=("weight_grad",))
    assert recipe.uses_fp8("forward")


@pytest.mark.parametrize(
    ("granularity", "rows", "columns"),
    [
        ("tensor", None, None),
        ("row", (1, None), (None, 1)),
        ("block_1x128", (1, 128), (128, 1)),
        ("block_128x128", (128, 128), (128, 128)),
        ("mx_1x32", (1, 32), (32, 1)),
    ],
)
def test_tiles_lie_along_the_sum(granularity, rows, columns):
    operand = Operand(granularity=granularity, power_of_two=True)
    assert (operand.tile(1), operand.tile(0)) == (rows, columns)


def test_granularities_may_differ_where_they_do_not_meet():
    recipe = Recipe(grad_output=Operand("e5m2", "row"), high_precision=("input_grad", "weight_grad"))
    assert recipe.uses_fp8("forward")


def test_a_recipe_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().scaling = "delayed"
    assert len({Recipe(), Recipe(), Recipe(high_precision=("weight_grad",))}) == 2


def test_a_mapping_overrides_fields_of_a_preset():
    recipe = resolve_recipe(
        {"preset": "tensorwise", "high_precision": ["weight_grad"], "grad_output": {"power_of_two": True}}
    )
    assert recipe == Recipe(grad_output=Operand("e5m2", power_of_two=True), high_precision=("weight_grad",))
    assert not recipe.uses_fp8("weight_grad")
    assert recipe.uses_fp8("forward")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: resolve_recipe("tensorwize"), ("'tensorwize'", "'tensorwise'")),
        (lambda: resolve_recipe({"high_precison": []}), ("'high_precison'", "'high_precision'")),
        (lambda: resolve_recipe({"input": {"fromat": "e4m3"}}), ("field of input", "'fromat'", "'format'")),
        (lambda: resolve_recipe({"input": {"format": "e4m2"}}), ("format", "'e4m2'", "e4m3")),
        (lambda: Operand("e3m4"), ("format", "'e3m4'", "e4m3, e5m2")),
        (lambda: Operand(granularity="column"), ("granularity", "'column'", "tensor")),
        (lambda: Operand(granularity="mx_1x32"), ("mx_1x32", "power_of_two")),
        (lambda: Recipe(weight=Operand(granularity="block_128x128")), ("tensor", "block_128x128", "block_1x128")),
        (lambda: Recipe(weight=Operand(granularity="row")), ("forward", "input", "tensor", "weight", "row")),
        (lambda: Recipe(scaling="static"), ("scaling", "'static'", "current")),
        (lambda: Recipe(high_precision=("wgrad",)), ("high_precision", "'wgrad'", "weight_grad")),
        (lambda: Recipe(high_precision=("forward", "input_grad", "weight_grad")), ("high_precision", "nothing")),
        (lambda: Recipe(fast_accumulation=("foward",)), ("fast_accumulation", "'foward'", "'forward'")),
        (lambda: Recipe(input=Operand("e5m2")), ("weight_grad", "grad_output", "input", "both e5m2", "high_precision")),
        (lambda: Recipe(weight=Operand("e5m2")), ("input_grad", "grad_output", "weight", "both e5m2", "e4m3")),
        (lambda: Recipe(scaling="delayed", history=0), ("history", "0", "at least 1")),
        (lambda: Recipe(scaling="delayed", history=2.5), ("history", "2.5", "whole")),
        (lambda: Recipe(scaling="delayed", margin=-1), ("margin", "-1", "0")),
        (lambda: Recipe(scaling="delayed", margin=0.5), ("margin", "0.5", "whole")),
        (lambda: Recipe(scaling="delayed", amax="mean"), ("amax", "'mean'", "max, most_recent")),
        (lambda: Recipe(history=4), ("history", "no effect", "scaling", "'delayed'")),
        (lambda: Recipe(margin=1, amax="most_recent"), ("amax, margin", "no effect", "'delayed'")),
        (
            lambda: resolve_recipe({"preset": "rowwise", "scaling": "delayed"}),
            ("input by row", "'tensor'", "'current'"),
        ),
        (
            lambda: resolve_recipe({"preset": "blockwise", "scaling": "delayed"}),
            ("input by block_1x128", "weight by block_128x128", "'tensor'"),
        ),
        (lambda: resolve_recipe({"preset": "delayd"}), ("preset", "'delayd'", "'delayed'")),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(make, words):
    with pytest.raises(ValueError, match=r"FP8|Recipe") as error:
        make()
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
