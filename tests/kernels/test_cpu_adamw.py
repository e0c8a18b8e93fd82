"""The C++ step against torch's operations: every bit of weights, codes and scales, and that it is the one that runs."""

import logging
import platform

import pytest
import torch

from lightning_fp8.kernels.cpu import build
from lightning_fp8.optim import FP8AdamW, packing

needs_compiler = pytest.mark.skipif(build.load("adamw") is None, reason="there is no C++ compiler")


def stepped(*, weights, grads, shape, steps=12, threads=1, lr=1e-2, factor=None, **options):
    """Trains two parameters on gradients of unequal columns, a third of them zero; returns the optimizer."""
    gen = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter((torch.randn(s, generator=gen) * 0.02).to(weights)) for s in (shape, (64, 320))]
    optimizer = FP8AdamW(zip("ab", params, strict=True), lr=lr, **options)
    for p in params:
        p.grad_dtype = grads
    before, _ = torch.get_num_threads(), torch.set_num_threads(threads)
    try:
        for step in range(steps):
            for p in params:
                # The last columns are of another kind: their second moments lie beyond a gap.
                size = (torch.randn(p.shape[-1], generator=gen) * 3).exp() * (torch.rand(p.shape, generator=gen) < 0.7)
                grad = torch.randn(p.shape, generator=gen) * 1e-3 * size
                grad[..., :2] *= step < 2  # two columns that die
                grad[..., -20:] *= 1e-12
                p.grad = grad.to(grads)
            optimizer.grad_factor = factor
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    return optimizer


def trained(**case):
    """All that is stored after it."""
    optimizer = stepped(**case)
    params = optimizer.param_groups[0]["params"]
    return [tensor for p in params for tensor in (p.detach(), *optimizer.state[p].values())]


def same(found, expected):
    return all(
        torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
        for a, b in zip(found, expected, strict=True)
    )


@pytest.fixture
def calls(monkeypatch):
    """Counts what the kernel steps."""
    counted = []
    kernel = packing.adamw
    monkeypatch.setattr(
        packing, "adamw", lambda *args: (counted.extend(matrix.weight.shape for matrix in args[0]), kernel(*args))
    )
    return counted


BF16, FP32 = torch.bfloat16, torch.float32
CASES = {
    "ragged": {"shape": (37, 200)},
    "narrow": {"shape": (5, 64)},
    "small blocks": {"shape": (16, 1000), "block_size": 32},
    "large blocks": {"shape": (3, 700), "block_size": 512},
    "experts": {"shape": (3, 8, 130)},
    "threads": {"shape": (64, 256), "threads": 3},
    "options": {"shape": (9, 300), "maximize": True, "max_update": 0.5, "clip_update_rms": 1.0, "weight_decay": 0.3},
    "tensor rate": {"shape": (9, 300), "lr": torch.tensor(0.02)},
    "a factor of the gradients": {"shape": (9, 300), "factor": torch.tensor(0.3), "maximize": True},
    "health": {"shape": (9, 300), "track_health": True},
    "slow averages": {"shape": (9, 300), "betas": (0.9, 0.95), "eps": 1e-12},
}


@needs_compiler
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("weights", "grads"), [(BF16, BF16), (FP32, FP32), (FP32, BF16), (BF16, FP32)])
def test_every_bit_is_that_of_the_operations(case, weights, grads, calls, monkeypatch):
    found = trained(weights=weights, grads=grads, **CASES[case])
    assert len(calls) == 2 * 12
    assert found[-1].any() or case == "large blocks"  # gaps, but where a block has no empty interval
    monkeypatch.setattr(packing, "has_adamw", lambda *_: False)
    assert same(found, trained(weights=weights, grads=grads, **CASES[case]))
    assert len(calls) == 2 * 12


@needs_compiler
@pytest.mark.parametrize(
    "options",
    [{"moments": "coat"}, {"rounding": "nearest"}, {"rounding": "kahan"}],
    ids=lambda options: next(iter(options)),
)
def test_what_the_kernel_does_not_do_is_left_to_the_operations(options, calls):
    trained(weights=BF16, grads=BF16, shape=(9, 300), steps=1, **options)
    assert not calls


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("weights", "size"), [(BF16, {}), (FP32, {}), (BF16, {"max_update": 0.5, "block_size": 32})])
def test_what_is_counted_is_what_the_operations_count(weights, size, threads, calls, monkeypatch):
    case = {"weights": weights, "grads": BF16, "shape": (37, 200), "lr": 1e-5, "track_health": True, **size}
    found = stepped(**case, threads=threads)._counted()
    assert calls
    monkeypatch.setattr(packing, "has_adamw", lambda *_: False)
    expected = stepped(**case)._counted()
    assert found.keys() == expected.keys()
    for names, theirs in expected.items():
        for name, value in theirs.counts._asdict().items():
            ours = getattr(found[names].counts, name)
            assert torch.allclose(ours, value, rtol=1e-5 * (name == "squared_updates"), atol=0), name
            assert (value > 0).all() or (name == "stayed" and weights is FP32) or name == "at_floor"
    assert (theirs.counts.at_floor > 0).any() or size  # small blocks reach far enough


@needs_compiler
def test_vectors_keep_their_moments_in_fp32_beside_it(calls):
    trained(weights=BF16, grads=BF16, shape=(300,), steps=1)
    assert calls == [(64, 320)]


# Building.


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Forgets what was built; the cache folder is empty."""
    build.load.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "lightning_fp8"
    build.load.cache_clear()


def test_without_a_compiler_the_operations_run_and_the_log_says_so(fresh, monkeypatch, caplog, calls):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with caplog.at_level(logging.INFO):
        found = trained(weights=BF16, grads=BF16, shape=(9, 300), steps=3)
    assert not calls
    assert caplog.text.count("no C++ compiler") == 1
    build.load.cache_clear()
    monkeypatch.undo()
    assert same(found, trained(weights=BF16, grads=BF16, shape=(9, 300), steps=3))


@needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names instruction sets of x86")
@pytest.mark.parametrize("instructions", ["-march=x86-64", "-march=x86-64-v2", "-march=x86-64-v3"])
def test_every_bit_is_the_same_whatever_instructions_it_is_built_of(instructions, fresh, monkeypatch, calls):
    expected = trained(weights=BF16, grads=BF16, shape=(37, 200))
    build.load.cache_clear()
    monkeypatch.setattr(build, "_NATIVE", instructions)
    assert same(trained(weights=BF16, grads=BF16, shape=(37, 200)), expected)
    assert len(list(fresh.iterdir())) == 2
    assert len(calls) == 4 * 12


@pytest.fixture
def small(fresh, monkeypatch):
    """A source that compiles at once, in a folder of its own."""
    source = fresh.parent / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(build, "__file__", str(fresh.parent / "build.py"))
    return source


@needs_compiler
def test_what_does_not_compile_is_reported_and_not_fatal(small, fresh, caplog):
    small.write_text("no C++")
    assert build.load("small") is None
    assert "small.cpp:1" in caplog.text
    assert not list(fresh.iterdir())


@needs_compiler
def test_a_library_is_built_once_and_anew_when_what_it_is_made_of_changes(small, fresh, monkeypatch):
    def loaded():
        build.load.cache_clear()
        return build.load("small").answer()

    assert loaded() == 42
    (built,) = fresh.iterdir()
    written = built.stat().st_mtime_ns
    assert loaded() == 42
    assert built.stat().st_mtime_ns == written
    small.write_text('extern "C" int answer() { return 43; }')
    assert loaded() == 43
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-DOTHER"))
    assert loaded() == 43
    assert len(list(fresh.iterdir())) == 3
    small.with_name("question.h").write_text("constexpr int kAnswer = 44;")
    small.write_text('#include "question.h"\nextern "C" int answer() { return kAnswer; }')
    assert loaded() == 44
    small.with_name("question.h").write_text("constexpr int kAnswer = 45;")
    assert loaded() == 45


@needs_compiler
def test_weights_that_are_not_finite_stay_what_they_are(calls):
    p = torch.nn.Parameter(torch.ones(2, 128).bfloat16())
    with torch.no_grad():
        p[0, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    p.grad = torch.ones_like(p)
    FP8AdamW([p]).step()
    assert calls
    assert p[0, :2].tolist() == [float("inf"), float("-inf")]
    assert p.isnan().sum() == 1
