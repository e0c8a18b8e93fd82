import pytest
import torch
from torch import nn

from lightning_fp8 import FP8Linear, convert_linears
from lightning_fp8.compute import restore_linears
from lightning_fp8.compute.gemm import record_gemms


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
