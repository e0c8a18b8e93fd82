"""Adaptive clipping against the papers' formulas, step by step in Python's floats."""

import math
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fp8.optim import AdaGC, FP8AdamW, ZClip, clip_grad_norm

SHAPES = [(3, 4), (5,), (2, 2)]


def gradients(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


def params_with(grads):
    params = [torch.zeros_like(grad, requires_grad=True) for grad in grads]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.clone()
    return params


def scales(steps):
    """Factors of the gradients of each step: a drift, noise and a few spikes."""
    generator = random.Random(0)
    return [math.exp(-0.01 * t) * generator.uniform(0.7, 1.3) * (30 if t in (40, 41, 70) else 1) for t in range(steps)]


def norm_of(grads):
    return math.sqrt(sum(grad.double().square().sum().item() for grad in grads))


def test_zclip_does_what_the_paper_says():
    clip, seen, mean, variance, cuts = ZClip(), [], 0.0, 0.0, 0
    for t, scale in enumerate(scales(100)):
        grads = gradients(t, scale)
        norm = expected = norm_of(grads)
        if t < 25:
            seen.append(norm)
            mean = sum(seen) / len(seen)
            variance = sum((n - mean) ** 2 for n in seen) / len(seen)
        else:
            z = (norm - mean) / (math.sqrt(variance) + 1e-6)
            if z > 2.5:
                expected, cuts = mean + 2.5**2 / z * math.sqrt(variance), cuts + 1
            mean = 0.97 * mean + 0.03 * expected
            variance = 0.97 * variance + 0.03 * (expected - mean) ** 2
        params = params_with(grads)
        assert clip.clip(params).item() == pytest.approx(norm, rel=1e-5)
        assert norm_of([p.grad for p in params]) == pytest.approx(expected, rel=1e-4)  # fp32, and 100 steps of state
        if expected == norm:
            assert all(torch.equal(p.grad, grad) for p, grad in zip(params, grads, strict=True))
    assert 3 <= cuts < 20


def test_adagc_does_what_the_paper_says():
    clip, averages, cuts = AdaGC(warmup_steps=20), [math.inf] * len(SHAPES), 0
    for t, scale in enumerate(scales(100)):
        grads = gradients(t, scale)
        if t in (40, 41):
            grads = [grads[0], gradients(t)[1], gradients(t)[2]]  # a spike in one tensor alone
        norms, total = [norm_of([grad]) for grad in grads], norm_of(grads)
        expected = []
        for i, norm in enumerate(norms):
            if t < 20:
                expected.append(norm * min(1, 1 / total))
                averages[i] = min(averages[i], expected[i])
            else:
                expected.append(min(norm, 1.05 * averages[i]))
                averages[i] = 0.98 * averages[i] + 0.02 * expected[i]
                cuts += norm > expected[i]
        params = params_with(grads)
        assert clip.clip(params).item() == pytest.approx(total, rel=1e-5)
        assert [norm_of([p.grad]) for p in params] == pytest.approx(expected, rel=1e-4)
    assert cuts > 20


@pytest.mark.parametrize("make", [lambda: ZClip(warmup_steps=5), lambda: AdaGC(warmup_steps=5)], ids=["zclip", "adagc"])
class TestBoth:
    def run(self, clip, steps, first=0):
        results = []
        for t in range(first, steps):
            params = params_with(gradients(t, 50.0 if t == 12 else 1.0))
            clip.clip(params)
            results += [p.grad for p in params]
        return results

    def test_state_makes_a_resume_exact(self, make):
        whole, first, second = make(), make(), make()
        expected = self.run(whole, 16)
        self.run(first, 10)
        state = first.state_dict()
        self.run(first, 12, first=10)  # what goes on does not change what was saved
        second.load_state_dict(state)
        rest = self.run(second, 16, first=10)
        assert all(torch.equal(a, b) for a, b in zip(expected[10 * len(SHAPES) :], rest, strict=True))
        forgotten = self.run(make(), 16, first=10)
        assert not all(torch.equal(a, b) for a, b in zip(rest, forgotten, strict=True))

    def test_what_is_not_finite_is_left_alone_and_forgotten(self, make):
        clip = make()
        self.run(clip, 10)
        before = clip.state_dict()
        grads = gradients(10)
        grads[1][0] = math.nan
        params = params_with(grads)
        clip.clip(params)
        assert all(torch.equal(p.grad.nan_to_num(), g.nan_to_num()) for p, g in zip(params, grads, strict=True))
        for name, value in clip.state_dict().items():
            assert name == "steps" or torch.equal(value, before[name])

    def test_nothing_is_read_by_the_host_and_bf16_stays(self, make):
        names = []

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                names.append(func.overloadpacket.__name__)
                return func(*args, **(kwargs or {}))

        clip = make()
        self.run(clip, 10)
        params = params_with([grad.bfloat16() for grad in gradients(3, 9.0)])
        with Operations():
            clip.clip(params)
            seen = len(names)
            params[0].grad.sum().item()
        assert "_local_scalar_dense" in names[seen:]  # a read would be seen
        assert not {"_local_scalar_dense", "item", "nonzero", "equal"} & set(names[:seen])
        assert seen < 60
        assert all(p.grad.dtype is torch.bfloat16 for p in params)

    def test_without_gradients_it_says_so(self, make):
        with pytest.raises(ValueError, match="after backward"):
            make().clip([torch.zeros(2, requires_grad=True)])


def test_adagc_follows_parameters_that_have_no_gradient_at_times():
    clip = AdaGC(warmup_steps=2)
    for t in range(6):
        params = params_with(gradients(t))
        params[1].grad = None if t % 2 else torch.zeros_like(params[1].grad)  # norms of 0 say nothing
        clip.clip(params)
    params = params_with(gradients(6))
    before = params[1].grad.clone()
    clip.clip(params)
    assert torch.equal(params[1].grad, before)  # its first norm, so it is not cut


@pytest.mark.parametrize(
    "make",
    [
        lambda: ZClip(alpha=1.0),
        lambda: ZClip(z_threshold=0),
        lambda: ZClip(warmup_steps=1),
        lambda: AdaGC(relative=0),
        lambda: AdaGC(beta=1),
        lambda: AdaGC(absolute=0),
        lambda: AdaGC(warmup_steps=0),
    ],
)
def test_arguments_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()


# The limit that the step of FP8AdamW applies itself.


def stepped(limit, *, dtype=torch.float32, steps=3, **options):
    """Weights after some steps with gradients that `limit(optimizer)` limits, and the norms that it returned."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((8, 200), (7,))]
    optimizer, norms = FP8AdamW(params, **options), []
    for step in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype) * 10.0 ** (step - 2)
        assert optimizer.grad_factor is None  # the last step's is forgotten
        norms.append(limit(optimizer))
        optimizer.step()
    return params, norms


@pytest.mark.parametrize("options", [{}, {"moments": "coat"}, {"clip_update_rms": 0.5}, {"track_health": True}])
def test_a_limit_in_the_step_is_a_limit_before_it(options):
    """In fp32, where nothing is rounded in between but for products of gradients and the factor."""

    def before(optimizer):
        return torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 2.0)

    expected, norms = stepped(before, **options)
    found, ours = stepped(lambda optimizer: clip_grad_norm(optimizer, 2.0), **options)
    assert torch.allclose(torch.stack(ours), torch.stack(norms), rtol=1e-6)
    assert ours[0] < 2 < ours[2]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    free, _ = stepped(lambda optimizer: torch.zeros(()), **options)
    assert not torch.equal(found[0], free[0])


def test_gradients_stay_as_they_are():
    params, _ = stepped(lambda optimizer: clip_grad_norm(optimizer, 1e-3))
    assert norm_of([p.grad for p in params]) > 10


def test_a_limit_can_be_withdrawn():
    def withdrawn(optimizer):
        grads = [p.grad for p in optimizer.param_groups[0]["params"]]
        clip_grad_norm(optimizer, 1e-3)
        optimizer.zero_grad()
        assert optimizer.grad_factor is None
        for p, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            p.grad = grad

    free, _ = stepped(lambda optimizer: None)
    assert all(torch.equal(a, b) for a, b in zip(stepped(withdrawn)[0], free, strict=True))


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_a_limit_that_is_none_is_refused(limit):
    with pytest.raises(ValueError, match=r"max_norm .* must be above 0"):
        stepped(lambda optimizer: clip_grad_norm(optimizer, limit), steps=1)
