"""What `FP8AdamW` offers beside the plain step."""

import copy
import math
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fp8.numerics.weights import BF16_WEIGHTS
from lightning_fp8.optim import FP8AdamW, adamw, packing
from lightning_fp8.optim.finite import all_finite
from lightning_fp8.optim.step import MOMENTS

SHAPES = {"a.weight": (24, 256), "b.weight": (16, 200), "norm": (96,)}


def parameters(dtype=torch.bfloat16, seed=0, device="cpu"):
    gen = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=gen).to(device, dtype)) for name, shape in SHAPES.items()
    }


def set_grads(params, step, size=1.0):
    for name, p in params.items():
        gen = torch.Generator().manual_seed(1000 * step + len(name))
        p.grad = (torch.randn(p.shape, generator=gen) * size).to(p.device, p.dtype)


def trained(steps, *, dtype=torch.bfloat16, size=1.0, **options):
    params = parameters(dtype)
    optimizer = FP8AdamW(list(params.items()), **{"lr": 0.01, **options})
    for step in steps:
        set_grads(params, step, size)
        optimizer.step()
    return params, optimizer


def bits_of(params, optimizer):
    tensors = {name: p.detach() for name, p in params.items()}
    tensors |= {f"{name}.{key}": value for name, p in params.items() for key, value in optimizer.state[p].items()}
    return {name: tensor.reshape(-1).view(torch.uint8).clone() for name, tensor in tensors.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("rounding", BF16_WEIGHTS)
def test_every_format_trains_and_resumes(moments, rounding):
    options = {"moments": moments, "rounding": rounding}
    params, optimizer = trained(range(3), **options)
    others = parameters(seed=9)
    for name, p in params.items():
        others[name].data.copy_(p)
    resumed = FP8AdamW(list(others.items()), lr=0.5, **options)
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    for step in range(3, 5):
        for ps, opt in ((params, optimizer), (others, resumed)):
            set_grads(ps, step)
            opt.step()
    assert_same(bits_of(params, optimizer), bits_of(others, resumed))
    assert all(p.isfinite().all() for p in params.values())


BYTES = {"fp8": 2 + 6 / 128, "e4m3": 2 + 8 / 128, "e4m3/e5m2": 2 + 8 / 128, "coat": 2 + 24 / 128, "bf16": 4, "fp32": 8}


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize(("rounding", "extra"), [("stochastic", 0), ("nearest", 0), ("kahan", 2), ("correction8", 1)])
def test_bytes_a_parameter(moments, rounding, extra):
    p = torch.nn.Parameter(torch.ones(64, 512).bfloat16())
    optimizer = FP8AdamW([p], moments=moments, rounding=rounding)
    p.grad = torch.ones_like(p)
    optimizer.step()
    stored = sum(t.untyped_storage().nbytes() for name, t in optimizer.state[p].items() if name != "step")
    assert stored / p.numel() == BYTES[moments] + extra


def test_embeddings_may_have_moments_of_their_own():
    params = parameters()
    groups = [
        {"params": [("a.weight", params["a.weight"])], "moments": "fp32"},
        {"params": [(name, params[name]) for name in ("b.weight", "norm")]},
    ]
    optimizer = FP8AdamW(groups)
    set_grads(params, 0)
    optimizer.step()
    assert optimizer.state[params["a.weight"]]["v"].dtype is torch.float32
    assert optimizer.state[params["b.weight"]]["v_codes"].dtype is torch.uint8


def test_maximize_is_minimising_the_negative():
    params, optimizer = trained([0, 1], maximize=True)
    others = parameters()
    other = FP8AdamW(list(others.items()), lr=0.01)
    for step in range(2):
        set_grads(others, step)
        for p in others.values():
            p.grad.neg_()
        other.step()
    assert_same(bits_of(params, optimizer), bits_of(others, other))


@pytest.mark.parametrize("cycle", ["betas", "lr"])
def test_options_that_change_from_step_to_step_are_torchs(cycle):
    """As OneCycleLR and CyclicLR change them: the bias of a step is corrected with that step's betas."""
    params, others = parameters(torch.float32), parameters(torch.float32)
    ours = FP8AdamW(list(params.items()), lr=1e-3, moments="fp32", maximize=True)
    torchs = torch.optim.AdamW(others.values(), lr=1e-3, maximize=True, foreach=False)
    for step in range(12):
        for ps, optimizer in ((params, ours), (others, torchs)):
            for group in optimizer.param_groups:
                if cycle == "betas":
                    group["betas"] = (0.85 + 0.01 * (step % 5), 0.95 + 0.004 * (step % 7))
                else:
                    group["lr"] = 1e-3 * (1 + step % 3)
            set_grads(ps, step)
            optimizer.step()
    for name, p in params.items():
        # Twelve steps of three roundings of weights below 5, and of updates that are right to 2^-13 (see test_adamw).
        torch.testing.assert_close(p, others[name], rtol=0, atol=12 * (15 * 2.0**-24 + 3e-3 * 2.0**-13))


def test_sparse_gradients_are_refused_by_name():
    embedding = torch.nn.Embedding(8, 64, sparse=True)
    optimizer = FP8AdamW(embedding.named_parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"^FP8AdamW: the gradient of 'weight' is sparse; give its layer sparse=False"):
        optimizer.step()


# Updates of limited size.


def stable_adamw(grads, weight, *, lr, betas, eps, weight_decay, limit):
    """Algorithm 2 of "Stable and low-precision training for large-scale vision-language models", in fp64."""
    w, m, v = weight.double(), 0.0, 0.0
    for t, g in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * g.double()
        v = betas[1] * v + (1 - betas[1]) * g.double().square()
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        rms = (g.double().square() / v_hat.clamp_min(eps**2)).mean().sqrt()
        rate = lr / max(1.0, float(rms) / limit)
        w = w - rate * weight_decay * w - rate * m_hat / (v_hat.sqrt() + eps)
    return w


@pytest.mark.parametrize("limit", [1.0, 0.3])
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)])
@pytest.mark.parametrize("elements", [300, 1 << 17])
def test_clip_update_rms_is_stable_adamw(limit, lr, elements, monkeypatch):
    monkeypatch.setattr("lightning_fp8.optim.packing._CHUNK_ELEMENTS", {"cpu": elements})
    params = parameters(torch.float32)
    before = {name: p.detach().clone() for name, p in params.items()}
    options = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = FP8AdamW(list(params.items()), lr=lr, moments="fp32", clip_update_rms=limit, **options)
    grads = {name: [] for name in params}
    for step in range(6):
        set_grads(params, step, size=10.0 if step == 4 else 1.0)  # a spike that v has not seen coming
        for name, p in params.items():
            grads[name].append(p.grad)
        optimizer.step()
    for name, p in params.items():
        expected = stable_adamw(grads[name], before[name], lr=0.01, limit=limit, **options)
        torch.testing.assert_close(p.double(), expected, rtol=0, atol=6 * 2.0**-22)
    plain, _ = trained([])
    assert plain.keys() == params.keys()


def test_a_limit_that_is_not_reached_changes_nothing():
    expected = bits_of(*trained(range(3)))
    assert_same(expected, bits_of(*trained(range(3), clip_update_rms=100.0, max_update=100.0)))


def test_max_update_limits_each_update():
    params = parameters(torch.float32)
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer = FP8AdamW(list(params.items()), lr=1.0, weight_decay=0.0, max_update=0.25)
    set_grads(params, 0)  # in a first step every update is 1 or -1
    optimizer.step()
    for name, p in params.items():
        torch.testing.assert_close((p - before[name]).abs(), torch.full_like(p, 0.25), rtol=0, atol=1e-6)


# Steps with gradients that are not finite.

BAD = [float("nan"), float("inf"), -float("inf"), 2.0**64, -3e38]


def poison(params, value, name="b.weight"):
    params[name].grad.view(-1)[-1] = value


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_a_bad_step_leaves_no_trace(value, at, masked, rounding, monkeypatch):
    """Bit-equal to a run that never saw it, on the path of CPUs and on the one that asks no device."""
    expected = bits_of(*trained([0, 1, 3], rounding=rounding))
    if masked:
        monkeypatch.setattr(adamw, "_FREE_TO_READ", ())
    params = parameters()
    optimizer = FP8AdamW(list(params.items()), lr=0.01, rounding=rounding)
    steps = [0, 1, 3]
    steps.insert(at, 2)
    for step in steps:
        set_grads(params, step)
        if step == 2:
            poison(params, value)
        optimizer.step()
    assert_same(expected, bits_of(params, optimizer))
    assert optimizer.skipped_steps == 1


def test_the_largest_gradient_that_is_taken():
    params = parameters()
    optimizer = FP8AdamW(list(params.items()), lr=0.01)
    set_grads(params, 0)
    poison(params, 2.0**63)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert optimizer.state[params["b.weight"]]["v_max"].isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
def test_raising_after_steps_in_a_row(masked, monkeypatch):
    if masked:
        monkeypatch.setattr(adamw, "_FREE_TO_READ", ())
    params = parameters()
    optimizer = FP8AdamW(list(params.items()), max_skipped_steps=3)
    for step, bad in enumerate([True, True, False, True, True]):
        set_grads(params, step)
        if bad:
            poison(params, float("nan"))
        optimizer.step()
    assert optimizer.skipped_steps == 4
    set_grads(params, 9)
    poison(params, float("inf"))
    with pytest.raises(FloatingPointError, match=r"the gradients of 3 steps in a row held NaN, inf or .*2\^63.*Lower"):
        optimizer.step()


def test_copies_count_from_zero():
    params, optimizer = trained(range(2))
    poison(params, float("nan"))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert copy.deepcopy(optimizer).skipped_steps == 0
    assert pickle.loads(pickle.dumps(optimizer)).skipped_steps == 0


def test_all_finite_looks_at_every_gradient():
    grads = [torch.ones(3), torch.zeros(0), torch.ones(2, 2, dtype=torch.bfloat16)]
    assert all_finite(grads)
    assert all_finite([torch.zeros(0)])
    for i in (0, 2):
        for value in (*BAD, -float("nan")):
            bad = [g.clone() for g in grads]
            bad[i].view(-1)[-1] = value
            assert not all_finite(bad), (i, value)


# What a GPU graph asks for.


class _HostReads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


ASKED = {
    "plain": {},
    "clipped": {"clip_update_rms": 1.0, "max_update": 2.0},
    "correction8": {"rounding": "correction8"},
    "kahan": {"rounding": "kahan"},
    "health": {"track_health": True},
    "e4m3": {"moments": "e4m3"},
    "coat": {"moments": "coat"},
    "tensor lr": {"lr": torch.tensor(0.01)},
}


@pytest.mark.parametrize("options", ASKED.values(), ids=ASKED)
def test_a_step_reads_nothing_from_the_device(options, monkeypatch):
    monkeypatch.setattr(adamw, "_FREE_TO_READ", ())
    params, optimizer = trained([0], **options)
    set_grads(params, 1)
    with _HostReads() as reads:
        optimizer.step()
    assert reads.found == []
    with _HostReads() as reads:
        assert optimizer.skipped_steps == 0
    assert reads.found  # so that the count can fail


def test_a_step_on_a_fake_gpu():
    """Fake tensors raise at any host read, and at operations between devices."""
    with FakeTensorMode():
        params = {
            name: torch.nn.Parameter(torch.zeros(shape, device="cuda").bfloat16()) for name, shape in SHAPES.items()
        }
        optimizer = FP8AdamW(list(params.items()), track_health=True, clip_update_rms=1.0)
        for _ in range(2):
            for p in params.values():
                p.grad = torch.zeros_like(p)
            optimizer.step()
        state = optimizer.state[params["a.weight"]]
        assert {tensor.device.type for tensor in state.values()} == {"cuda"}
        assert {figure.device.type for figure in optimizer.health()} == {"cuda"}


# The compiled step.


def compiled_graphs(backend, monkeypatch, **options):
    """Trains with a compiled step and returns what came of it and the number of its graphs."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, example)

    step = torch.compile(packing.step_rows, backend=count, dynamic=True, fullgraph=True)
    monkeypatch.setattr(packing, "_compiled_step", lambda: step)
    monkeypatch.setattr(packing, "has_adamw", lambda *_: False)  # which steps without a graph
    params = parameters()
    optimizer = FP8AdamW([(name, params[name]) for name in ("a.weight", "b.weight")], compile=True, **options)
    for step_number in range(4):
        set_grads(params, step_number)
        for group in optimizer.param_groups:
            group["lr"], group["betas"] = 0.01 / (1 + step_number), (0.9, 0.95 + step_number / 100)
            group["params"][-1].grad = None if step_number == 2 else group["params"][-1].grad  # other shapes
        optimizer.step()
    return bits_of({name: params[name] for name in ("a.weight", "b.weight")}, optimizer), len(graphs)


@pytest.mark.slow
def test_one_graph_whatever_changes_between_steps(monkeypatch):
    assert compiled_graphs("eager", monkeypatch)[1] == 1


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["stochastic", "correction8"])
def test_a_compiled_step_is_the_eager_one(rounding, monkeypatch):
    compiled, graphs = compiled_graphs("inductor", monkeypatch, rounding=rounding)
    assert graphs <= 2  # the compiler may tell small shapes from large ones
    assert_same(compiled, compiled_graphs("eager", monkeypatch, rounding=rounding)[0])


# Health.


def test_health_of_a_step_that_is_known():
    p = torch.nn.Parameter(torch.ones(8, 200).bfloat16())
    optimizer = FP8AdamW([("w", p)], lr=1e-6, weight_decay=0.0, rounding="nearest", track_health=True)
    p.grad = torch.full_like(p, 0.5)
    p.grad[:, 100:] *= -1
    optimizer.step()
    health = optimizer.health()
    assert health.v_at_floor == 0
    assert health.updates_lost == 1
    # In a first step u = g / (|g| + eps). Each of fp32's roundings is 2^-24.
    assert abs(health.max_update - 1) < 1e-6
    assert abs(health.update_rms - 1) < 1e-6


def test_health_counts_lost_updates_by_rounding():
    """Odds of 1/40: a stochastic rounding moves that share, Kahan's and the correction's weights all."""
    lost = {}
    for rounding in BF16_WEIGHTS:
        p = torch.nn.Parameter(torch.full((64, 256), 1.0).bfloat16())
        lr = 2.0**-8 / 40  # below 1 a last bit is 2^-8
        optimizer = FP8AdamW([("w", p)], lr=lr, weight_decay=0.0, rounding=rounding, track_health=True)
        p.grad = torch.ones_like(p)
        optimizer.step()
        lost[rounding] = float(optimizer.health().updates_lost)
    assert lost["nearest"] == 1
    assert lost["kahan"] == lost["correction8"] == 0
    assert abs(lost["stochastic"] - 39 / 40) < 5 * math.sqrt(39) / 40 / 128


def test_health_counts_v_at_the_floor():
    shares = {}
    for moments in ("fp8", "e4m3"):
        p = torch.nn.Parameter(torch.zeros(4, 128))
        optimizer = FP8AdamW([p], moments=moments, track_health=True)
        p.grad = torch.ones_like(p)
        p.grad[:, :32] = 2.0**-12  # v is 24 octaves down: 0 in E4M3, in range of fp8
        p.grad[:, 32:40] = 2.0**-24  # 48 octaves
        p.grad[:, 40:48] = 0.0  # not positive: not counted
        optimizer.step()
        shares[moments] = float(optimizer.health().v_at_floor)
    assert shares == pytest.approx({"fp8": 8 / 120, "e4m3": 40 / 120})


def test_health_is_over_all_groups_that_ask_for_it():
    params = parameters()
    groups = [{"params": [item], "track_health": item[0] != "norm"} for item in params.items()]
    optimizer = FP8AdamW(groups, weight_decay=0.0)
    with pytest.raises(ValueError, match="nothing was counted; set track_health=True and take a step first"):
        optimizer.health()
    set_grads(params, 0)
    params["norm"].grad *= 0
    optimizer.step()
    assert abs(optimizer.health().update_rms - 1) < 1e-3  # 0 for a third of the parameters if `norm` were in it
    before = optimizer.health()
    set_grads(params, 1)
    poison(params, float("nan"))
    optimizer.step()  # skipped
    assert optimizer.health() == before


def test_health_changes_no_bit():
    assert_same(bits_of(*trained(range(3))), bits_of(*trained(range(3), track_health=True)))
