import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

from lightning_fp8 import convert_linears
from lightning_fp8.compute import casts, end_step
from lightning_fp8.compute.casts import shared_cast
from lightning_fp8.compute.recipe import PRESETS
from lightning_fp8.optim import FP8AdamW

CACHED = ["tensorwise", "delayed", "rowwise", "blockwise", "mxfp8"]


@pytest.fixture
def made(monkeypatch):
    """The roles of the casts that were really made."""
    roles, cast = [], casts.cast

    def counted(x, role, *args, rows, columns):
        if rows or columns:
            roles.append(role)
        return cast(x, role, *args, rows=rows, columns=columns)

    monkeypatch.setattr(casts, "cast", counted)
    monkeypatch.setattr("lightning_fp8.compute.linear.cast", counted)
    return roles


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def linear(recipe="tensorwise", k=64, n=64, seed=0, **options):
    torch.manual_seed(seed)
    layer = nn.Linear(k, n).bfloat16()
    convert_linears(layer, recipe, **options)
    return layer


def cast_of(x, layout="rows", recipe="tensorwise", role="input"):
    wanted = {"rows": layout == "rows", "columns": layout == "columns"}
    return getattr(shared_cast(x, role, PRESETS[recipe], None, **wanted), layout)


def same_codes(a, b):
    return torch.equal(a.codes.view(torch.uint8), b.codes.view(torch.uint8)) and torch.equal(a.scale, b.scale)


@pytest.mark.parametrize(
    "view",
    [
        lambda h: h,
        lambda h: h.view(4, 8, 64),
        lambda h: h.view(4, 8, 64).view(32, 64),
        lambda h: h.view_as(h),
        lambda h: h.unsqueeze(0),
    ],
)
def test_one_cast_serves_the_tensor_and_the_views_of_all_of_it(view, made):
    base = tensor(32, 64)
    h = base.view(32, 64)  # as a layer's input often is: itself a view
    first, second, third = cast_of(h), cast_of(view(h)), cast_of(base)
    assert len(made) == 1
    assert first.codes is second.codes is third.codes
    assert same_codes(first, cast_of(base.clone()))


@pytest.mark.parametrize(
    "other",
    [
        lambda h: h[:16],  # a part
        lambda h: h[::2],
        lambda h: h.view(64, 32),  # other lines
        lambda h: h.clone(),
        lambda h: h[:1].expand(32, 64),  # as large as the base, and as strided as the next
        lambda h: h[1:2].expand(32, 64),
        lambda h: h.as_strided((32, 64), (1, 32)),
    ],
)
def test_other_elements_or_other_lines_are_cast_by_themselves(other, made):
    h = tensor(32, 64)
    h.view(-1)[7] = 100.0  # in row 0: the scales of slices differ
    every = [
        lambda h: h,
        lambda h: h[:1].expand(32, 64),
        lambda h: h[1:2].expand(32, 64),
        lambda h: h.t().reshape(64, 32),
    ]
    for make in every:
        cast_of(make(h))
    got = cast_of(other(h))
    expected = cast_of(other(h).clone().contiguous())
    assert same_codes(got, expected)


def test_formats_scales_and_layouts_are_told_apart(made):
    h = tensor(32, 64)
    for layout, recipe in (("rows", "tensorwise"), ("columns", "tensorwise"), ("rows", "rowwise"), ("rows", "mxfp8")):
        cast_of(h, layout, recipe)
    assert len(made) == 3  # one scale a tensor serves both layouts
    cast_of(h, "columns", "rowwise")
    cast_of(h, role="grad_output")
    assert len(made) == 5


@pytest.mark.parametrize(
    "change",
    [lambda h: h.mul_(2), lambda h: h[3:4].zero_(), lambda h: h.view(-1).add_(1), lambda h: h.detach().copy_(h)],
)
def test_a_change_in_place_makes_a_cast_void(change, made):
    h = tensor(32, 64)
    cast_of(h)
    change(h)
    now = cast_of(h)
    assert len(made) == 2
    assert same_codes(now, cast_of(h.clone()))
    cast_of(h)
    assert len(made) == 3  # and the new one is shared again


def test_casts_are_shared_without_gradients_and_not_in_inference_mode(made):
    h = tensor(32, 64)
    with torch.no_grad():
        cast_of(h)
        cast_of(h)
    assert len(made) == 1
    with torch.inference_mode():
        inner = tensor(32, 64)
        cast_of(inner)
        cast_of(inner)
        assert len(made) == 3
        cast_of(h)  # as what a cast made here would be, which no later backward could use
    assert len(made) == 4
    cast_of(h)
    assert len(made) == 4


def test_a_cast_dies_with_its_tensor():
    h = tensor(32, 64)
    codes, alive = weakref.ref(cast_of(h).codes), weakref.ref(h)
    assert codes() is not None
    del h
    gc.collect()
    assert alive() is None
    assert codes() is None


def test_a_cast_dies_with_the_base_of_its_view():
    base = tensor(32, 64)
    codes = weakref.ref(cast_of(base.view(4, 8, 64)).codes)
    assert codes() is not None
    del base
    gc.collect()
    assert codes() is None


def test_a_cast_outlives_python_s_name_of_a_tensor_that_autograd_holds(made):
    """The wrapper goes and comes back with the tensor inside; so do its casts, or none at all: never another's."""
    layer = linear()
    x = tensor(32, 64).requires_grad_()
    h = x * 1
    y = layer(h) + (h * h).sum()
    del h
    gc.collect()
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("preset", CACHED)
def test_casts_are_no_part_of_what_is_copied_or_saved(preset):
    layer, h = linear(preset, cache_weights=True), tensor(32, 64)
    blank = pickle.dumps(layer.state_dict()), len(pickle.dumps(layer))
    layer(h).sum().backward()
    layer.zero_grad()
    file = io.BytesIO()
    torch.save(h, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), h)
    assert pickle.dumps(layer.state_dict()) == blank[0]
    assert len(pickle.dumps(layer)) == blank[1]
    twin, other = copy.deepcopy(h), copy.deepcopy(layer)
    twin.mul_(2)
    with torch.no_grad():
        other.weight.mul_(2)
    torch.testing.assert_close(other(twin) - other.bias, 4 * (layer(h) - layer.bias), rtol=2**-5, atol=0.05)


@pytest.mark.parametrize(("preset", "copies"), [("tensorwise", 1), ("delayed", 1), ("rowwise", 2), ("blockwise", 2)])
def test_weights_are_cast_once_a_step_and_layout(preset, copies, made):
    """One copy where a scale serves both layouts. Square tiles do too."""
    copies = 1 if preset == "blockwise" else copies
    for cached, expected in ((False, 3 * 2), (True, copies)):
        layer = linear(preset, cache_weights=cached)
        made.clear()
        for seed in range(3):
            layer(tensor(32, 64, seed=seed).requires_grad_()).sum().backward()
        assert made.count("weight") == expected
        end_step(layer)
        made.clear()
        layer(tensor(32, 64))
        assert made.count("weight") == 1  # the step has ended


def run(preset, cache_weights, make_optimizer, steps=4, micro_batches=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32)).bfloat16()
    convert_linears(model, preset, cache_weights=cache_weights)
    optimizer = make_optimizer(model.parameters())
    seen = []
    for step in range(steps):
        for micro_batch in range(micro_batches):
            loss = (model(tensor(16, 64, seed=10 * step + micro_batch)) - 1).float().square().mean()
            loss.backward()
            seen.append(loss.item())
        seen += [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        end_step(model)
        optimizer.zero_grad()
    return seen + [p.detach() for p in model.parameters()]


class ThroughData(torch.optim.Optimizer):
    """Writes weights as some optimizers and FSDP do: without counting a version."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-0.1)


OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "FP8AdamW": lambda params: FP8AdamW(params, lr=1e-2),
    "through .data": ThroughData,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("preset", PRESETS)
def test_keeping_weight_casts_changes_no_bit(preset, optimizer):
    off, on = (run(preset, cached, OPTIMIZERS[optimizer]) for cached in (False, True))
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(off, on, strict=True))


def test_an_optimizer_that_counts_versions_needs_no_end_of_step():
    layer, x = linear(cache_weights=True), tensor(16, 64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).sum().backward()
    optimizer.step()
    fresh = linear()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), fresh(x))


def test_one_that_does_not_needs_it():
    layer, x = linear(cache_weights=True), tensor(16, 64)
    before = layer(x)
    layer.weight.data.mul_(0.5)
    assert torch.equal(layer(x), before)  # what `end_step` is for
    end_step(layer)
    assert not torch.equal(layer(x), before)


@pytest.mark.parametrize(("preset", "copies"), [("tensorwise", 1), ("rowwise", 2), ("mxfp8", 2)])
def test_the_end_of_a_step_frees_what_was_kept(preset, copies):
    layer = linear(preset, cache_weights=True)
    layer(tensor(32, 64).requires_grad_()).sum().backward()
    kept = casts._known[layer.weight].made.values()
    found = {id(q.codes): q.codes for _, cast in kept for q in (cast.rows, cast.columns) if q is not None}
    codes = list(found.values())
    assert sum(c.numel() * c.element_size() for c in codes) == copies * layer.weight.numel()  # a byte a weight and copy
    references = [weakref.ref(c) for c in codes]
    del codes, found, kept
    end_step(layer)
    gc.collect()
    assert not any(reference() for reference in references)
    assert layer.weight not in casts._known


def test_weights_that_are_not_cached_leave_nothing_behind():
    layer = linear("rowwise")
    layer(tensor(32, 64).requires_grad_()).sum().backward()
    assert layer.weight not in casts._known
