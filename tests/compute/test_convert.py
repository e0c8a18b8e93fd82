import pytest
import torch
from torch import nn

from lightning_fp8 import FP8Linear, convert_linears
from lightning_fp8.compute import PRESETS, restore_linears
from lightning_fp8.compute.gemm import record_gemms
from lightning_fp8.compute.sizes import slower


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(48, 32)
        self.body = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.narrow = nn.Linear(32, 10)
        self.attention = nn.MultiheadAttention(32, 2)
        self.tied = nn.Linear(32, 48, bias=False)
        self.tied.weight = self.embedding.weight
        self.lm_head = nn.Linear(32, 48)


KEPT = {
    "narrow": "32 x 10",
    "attention.in_proj_weight": "MultiheadAttention",
    "attention.out_proj": "NonDynamicallyQuantizableLinear",
    "tied": "tied to an embedding",
    "lm_head": "'*lm_head*'",
}


def test_every_linear_is_converted_or_kept_with_the_reason():
    model = Model()
    report = convert_linears(model)
    assert report.converted == ["body.0", "body.2"]
    assert report.kept.keys() == KEPT.keys()
    assert all(reason in report.kept[name] for name, reason in KEPT.items())
    for name, module in model.named_modules():
        assert isinstance(module, FP8Linear) == (name in report.converted)


def test_the_report_prints_one_line_a_layer():
    lines = str(convert_linears(Model())).splitlines()
    assert len(lines) == 7
    assert lines[0].split() == ["body.0", "FP8"]
    assert lines[-1].startswith("lm_head")
    assert "kept: name matches" in lines[-1]


def test_patterns_choose_what_is_kept():
    model = Model()
    report = convert_linears(model, keep_high_precision=("body.0",))
    assert report.converted == ["body.2", "lm_head"]


def test_converting_twice_changes_nothing_but_the_recipe():
    model = Model()
    first = convert_linears(model)
    weight = model.body[0].weight
    second = convert_linears(model, {"high_precision": ["weight_grad"]})
    assert second.converted == first.converted
    assert model.body[0].weight is weight
    assert model.body[0].fp8_recipe.high_precision == ("weight_grad",)


def test_restoring_undoes_it():
    model = Model()
    before = {name: (type(m), set(vars(m))) for name, m in model.named_modules()}
    convert_linears(model)
    assert restore_linears(model) == ["body.0", "body.2"]
    assert {name: (type(m), set(vars(m))) for name, m in model.named_modules()} == before
    with record_gemms() as gemms:
        model.body(torch.randn(16, 32))
    assert not gemms


def test_a_root_linear_is_converted_in_place():
    layer = nn.Linear(32, 32)
    assert convert_linears(layer).converted == [""]
    assert isinstance(layer, FP8Linear)


def test_an_optimizer_built_before_still_trains_the_model():
    model = nn.Sequential(nn.Linear(32, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[0].weight.detach().clone()
    convert_linears(model)
    model(torch.randn(16, 32)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_an_unknown_recipe_leaves_the_model_alone():
    model = Model()
    with pytest.raises(ValueError, match="tensorwise"):
        convert_linears(model, "tensorwize")
    assert not any(isinstance(m, FP8Linear) for m in model.modules())


@pytest.mark.parametrize("recipe", PRESETS)
def test_restoring_leaves_no_attribute(recipe):
    layer = nn.Linear(32, 32)
    before = set(vars(layer))
    convert_linears(layer, recipe, cache_weights=True)
    layer(torch.randn(16, 32)).sum().backward()
    restore_linears(layer)
    assert set(vars(layer)) == before
    assert type(layer) is nn.Linear
    assert restore_linears(layer) == []


def test_converting_again_with_other_patterns_restores_what_they_keep():
    model = Model()
    convert_linears(model)
    report = convert_linears(model, keep_high_precision=("body.0",))
    assert type(model.body[0]) is nn.Linear
    assert "fp8_recipe" not in vars(model.body[0])
    assert report.converted == ["body.2", "lm_head"]
    assert convert_linears(model).converted == ["body.0", "body.2"]


# Source: torchao's `_auto_filter_for_recipe`, "tensorwise" and "rowwise", measured on an H100.
SIZES = {
    "tensorwise": {
        (4096, 1024): True,
        (4112, 1024): False,
        (4096, 1040): False,
        (16, 16): True,
        (1024, 4096): False,
        (8192, 16): False,
    },
    "rowwise": {
        (16384, 2048): True,
        (16384, 2064): False,
        (1024, 16384): True,
        (1040, 16384): False,
        (2048, 4096): True,
        (2064, 4096): False,
        (2048, 4112): False,
    },
}


@pytest.mark.parametrize(
    ("preset", "inputs", "outputs", "expected"),
    [
        (preset, inputs, outputs, expected)
        for preset in PRESETS
        for (inputs, outputs), expected in SIZES[
            "tensorwise" if preset in ("tensorwise", "delayed") else "rowwise"
        ].items()
    ],
)
def test_sizes_known_to_be_slower_are_kept_where_it_is_asked_for(preset, inputs, outputs, expected):
    reason = slower(inputs, outputs, PRESETS[preset])
    assert bool(reason) == expected
    with torch.device("meta"):
        layer = nn.Linear(inputs, outputs)
    assert convert_linears(layer, preset).converted == [""]  # off by default
    report = convert_linears(layer, preset, keep_slow=True)
    assert report.kept == ({"": reason} if expected else {})
    assert report.converted == ([] if expected else [""])
    if expected:
        assert f"{inputs} x {outputs}" in reason
        assert "H100" in reason
        assert type(layer) is nn.Linear


@pytest.mark.parametrize("separate", [False, True])
def test_attention_that_multiplies_by_its_own_weights_is_reported(separate):
    attention = nn.MultiheadAttention(32, 2, **({"kdim": 48, "vdim": 64} if separate else {}))
    weights = ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if separate else ["in_proj_weight"]
    report = convert_linears(attention)
    assert list(report.kept) == [*weights, "out_proj"]
    assert not report.converted
    x = torch.randn(5, 1, 32)
    keys = (torch.randn(5, 1, 48), torch.randn(5, 1, 64)) if separate else (x, x)
    with record_gemms() as gemms:
        attention(x, *keys)
    assert not gemms


@pytest.fixture
def fastpath():
    before = torch.backends.mha.get_fastpath_enabled()
    yield torch.backends.mha.set_fastpath_enabled
    torch.backends.mha.set_fastpath_enabled(before)


def test_the_fused_path_of_an_encoder_layer_is_reported_and_can_be_turned_off(fastpath):
    encoder = nn.TransformerEncoderLayer(32, 2, dim_feedforward=64, batch_first=True)
    report = convert_linears(nn.ModuleDict({"encoder": encoder}))
    assert report.converted == ["encoder.linear1", "encoder.linear2"]
    reason = report.kept["encoder.forward (evaluation)"]
    assert "set_fastpath_enabled(False)" in reason
    assert "encoder.self_attn.in_proj_weight" in report.kept
    x = torch.randn(2, 8, 32)
    counts = {}
    for enabled in (True, False):
        fastpath(enabled)
        encoder.eval()
        with torch.no_grad(), record_gemms() as gemms:
            encoder(x)
        counts[enabled] = len(gemms)
    encoder.train()
    fastpath(True)
    with record_gemms() as gemms:
        encoder(x)
    assert counts == {True: 0, False: 2}
    assert len(gemms) == 2


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        (("*blocks.0.*", "*blocks.-1.*"), {"body.blocks.0.0", "body.blocks.0.1", "body.blocks.2.0", "body.blocks.2.1"}),
        (("*blocks.-2.-1",), {"body.blocks.1.1"}),
        (("*blocks.2.-2",), {"body.blocks.2.0"}),
        (("*blocks.-3.1",), {"body.blocks.0.1"}),
        (("*blocks.-4.*", "*blocks.3.*"), set()),
    ],
)
def test_blocks_count_from_the_end_too(patterns, kept):
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in range(3))
    model = nn.ModuleDict({"body": nn.ModuleDict({"blocks": blocks})})
    report = convert_linears(model, keep_high_precision=patterns)
    assert set(report.kept) == kept
    assert len(report.converted) == 6 - len(kept)
