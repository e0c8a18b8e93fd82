"""The Triton step against torch's operations in Triton's interpreter: run by `test_interpreter.py`.

States come from some steps by operations; then both take the same step, and every bit of what is stored is compared.
"""

import os

import pytest
import torch
import triton
import triton.language as tl

from lightning_fp8.kernels.adamw import Group, Matrix
from lightning_fp8.kernels.triton import adamw as kernels
from lightning_fp8.kernels.triton import ieee
from lightning_fp8.kernels.triton.elementary import as_float, as_int
from lightning_fp8.kernels.triton.launch_adamw import launch
from lightning_fp8.kernels.triton.tables import roots
from lightning_fp8.numerics.moments import FP8Moments, m_levels
from lightning_fp8.optim import FP8AdamW, packing

assert os.environ.get("TRITON_INTERPRET") == "1"

BF16, FP32 = torch.bfloat16, torch.float32
GUARD = 256


def guarded(tensor):
    """A copy of `tensor` in memory that goes on behind it, and whether that is as it was."""
    memory = torch.cat([tensor.flatten(), torch.full((GUARD,), 3.0).to(tensor.dtype)])
    return memory[: tensor.numel()].view(tensor.shape), lambda: bool((memory[-GUARD:].float() == 3).all())


class Kernel:
    """Stands where the choice between kernel and operations is made, and can be switched on."""

    def __init__(self, monkeypatch):
        self.on, self.stepped = False, 0
        monkeypatch.setattr(packing, "has_adamw", lambda *_: self.on)
        monkeypatch.setattr(packing, "adamw", self)

    def __call__(self, matrices, steps, numbers, group, block_size, finite):
        copies, checks = [], []
        for matrix in matrices:
            pairs = [guarded(t) for t in (matrix.weight, *matrix.moments)]
            tensors, whole = zip(*pairs, strict=True)
            checks += whole
            copies.append(matrix._replace(weight=tensors[0], moments=FP8Moments(*tensors[1:])))
        launch(copies, steps, numbers, group, block_size, finite)
        assert all(whole() for whole in checks), "the kernel wrote beyond a tensor"
        for matrix, copy in zip(matrices, copies, strict=True):
            for mine, new in zip((matrix.weight, *matrix.moments), (copy.weight, *copy.moments), strict=True):
                mine.copy_(new)
            self.stepped += matrix.weight.numel()


def stored(kernel, by_kernel, *, shapes, weights=BF16, grads=BF16, steps=9, age=0, size=1e-3, rare=1.0, **options):
    """All that is stored after some steps, the last of them perhaps by the kernel."""
    gen = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter((torch.randn(s, generator=gen) * 0.02).to(weights)) for s in shapes]
    optimizer = FP8AdamW([(f"p{i}", p) for i, p in enumerate(params)], **{"lr": 1e-2, **options})
    for p in params:
        p.grad_dtype = grads
    for step in range(steps):
        for p in params:
            spread = (torch.randn(p.shape[-1:], generator=gen) * 3).exp()
            grad = torch.randn(p.shape, generator=gen) * size * spread * (torch.rand(p.shape, generator=gen) < 0.7)
            grad[..., :2] *= step < 2  # two columns that die
            grad[..., 2::3] *= rare
            p.grad = grad.to(grads)
        kernel.on = by_kernel and step == steps - 1
        for state in optimizer.state.values():
            state["step"] += age * (step == steps - 1)
        optimizer.step()
    return [tensor for p in params for tensor in (p.detach(), *optimizer.state[p].values())]


def same(a, b):
    """Bit for bit; one NaN is as good as another."""
    nan = a.isnan() & b.isnan()
    a, b = (t.masked_fill(nan, 0).flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def check(monkeypatch, **case):
    kernel = Kernel(monkeypatch)
    expected = stored(kernel, False, **case)
    assert not kernel.stepped
    found = stored(kernel, True, **case)
    assert kernel.stepped == sum(torch.Size(s).numel() for s in case["shapes"])
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


# Rows that begin on 16 bytes and rows that do not, whole blocks and ragged ones, and parameters without elements.
MANY = [(5, 256), (3, 200), (0, 128), (2, 64), (2, 130)]
CASES = {
    "many": {"shapes": MANY},
    "many in fp32": {"shapes": MANY[1:4], "weights": FP32, "grads": FP32},
    "one": {"shapes": [(7, 200)]},
    "fp32 weights": {"shapes": [(2, 160)], "weights": FP32},
    "fp32 gradients": {"shapes": [(2, 160)], "grads": FP32},
    "experts": {"shapes": [(2, 3, 144)]},
    "small blocks": {"shapes": [(3, 300)], "block_size": 16},
    "large blocks": {"shapes": [(2, 2100)], "block_size": 2048},
    "options": {"shapes": [(2, 160)], "maximize": True, "max_update": 0.5, "clip_update_rms": 1.0, "weight_decay": 0.3},
    "tensor rate": {"shapes": [(2, 160)], "lr": torch.tensor(0.02)},
    "slow averages": {"shapes": [(2, 160)], "betas": (0.9, 0.95), "eps": 1e-15},
    "no eps, huge gradients": {"shapes": [(2, 160)], "size": 1e14, "eps": 0.0, "grads": FP32},
    "tiny gradients": {"shapes": [(2, 160)], "size": 1e-19, "grads": FP32},
    "no eps, tiny gradients": {"shapes": [(2, 160)], "size": 1e-20, "eps": 0.0, "grads": FP32},
    "huge gradients": {"shapes": [(2, 160)], "size": 1e14, "grads": FP32},
    "two kinds of columns": {"shapes": [(2, 200), (2, 256)], "rare": 1e-13, "grads": FP32},
    "first step": {"shapes": [(3, 130)], "steps": 1},
    "a new start of the dither": {"shapes": [(2, 64)], "age": 2**20 + 1017},
}


@pytest.mark.parametrize("case", CASES)
def test_every_bit_is_that_of_the_operations(case, monkeypatch):
    check(monkeypatch, **CASES[case])


@pytest.mark.parametrize("exponent", [2, 8, 20, 40, 66, 68])
def test_ratios_below_every_number_that_is_normal(exponent, monkeypatch):
    """As after hundreds of steps without a gradient: m is next to nothing, sqrt(v) is not."""
    kernel = Kernel(monkeypatch)
    results = []
    for by_kernel in (False, True):
        kernel.on, gen = False, torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.ones(2, 128, dtype=BF16))
        optimizer = FP8AdamW([("p", p)])
        for _ in range(3):
            p.grad = torch.randn(2, 128, generator=gen).to(BF16)
            optimizer.step()
        optimizer.state[p]["m_scale"].fill_(exponent)
        p.grad.zero_()
        kernel.on = by_kernel
        optimizer.step()
        results.append([p.detach(), *optimizer.state[p].values()])
    assert kernel.stepped
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_some_blocks_have_a_gap_in_their_lattice(monkeypatch):
    kernel, gaps = Kernel(monkeypatch), []
    monkeypatch.setattr(FP8AdamW, "_state_of", lambda *_, f=FP8AdamW._state_of: gaps.append(f(*_)) or gaps[-1])
    stored(kernel, False, **CASES["two kinds of columns"])
    assert any((state["v_gap"] > 0).any() for state in gaps)


GROUP = Group(0.9, 1 - 0.9, 0.999, 1 - 0.999, 1e-8, 1.0, None)


def made(rows, columns, first_row=0, first_column=0):
    gen = torch.Generator().manual_seed(1)
    weight, grad = (torch.randn(rows, columns, generator=gen).bfloat16() for _ in range(2))
    moments = FP8Moments.zeros(rows, columns, 128, torch.device("cpu"))
    return Matrix(weight, grad, moments, first_row, first_column, (-12345, 67890))


def step(matrices, finite=None):
    numbers = torch.tensor([[1e-2, 1 - 1e-4, 10.0, 1000.0]]).expand(len(matrices), 4).contiguous()
    launch(matrices, torch.ones(len(matrices), dtype=torch.int32), numbers, GROUP, 128, finite)


def test_a_shard_is_stepped_as_the_part_of_the_whole_that_it_is():
    whole = made(6, 256)
    part = Matrix(
        whole.weight[2:5, 128:].contiguous(),
        whole.grad[2:5, 128:].contiguous(),
        FP8Moments.zeros(3, 128, 128, torch.device("cpu")),
        2,
        128,
        whole.key,
    )
    step([whole])
    step([part])
    assert torch.equal(part.weight, whole.weight[2:5, 128:])
    assert torch.equal(part.moments.v_codes, whole.moments.v_codes[2:5, 128:])
    assert torch.equal(part.moments.m_scale, whole.moments.m_scale[2:5, 1:])


@pytest.mark.parametrize("count", [1, 2])
def test_a_step_that_is_not_to_be_taken_changes_nothing(count):
    matrices, before = ([made(2, 192) for _ in range(count)] for _ in range(2))
    step(matrices, torch.tensor(False))
    for a, b in zip(matrices, before, strict=True):
        assert torch.equal(a.weight, b.weight)
        assert all(torch.equal(x, y) for x, y in zip(a.moments, b.moments, strict=True))
    step(matrices, torch.tensor(True))
    assert not torch.equal(matrices[0].weight, before[0].weight)


def test_weights_that_are_not_finite_stay_what_they_are():
    matrix = made(1, 128)
    matrix.weight[0, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    step([matrix])
    assert matrix.weight[0, :2].tolist() == [float("inf"), float("-inf")]
    assert matrix.weight.isnan().sum() == 1


def test_offsets_beyond_two_to_the_31():
    """The last tile of three rows of 2^30 elements; memory that nobody touches costs nothing."""
    columns, tile = 2**30, kernels.TILE
    first = columns - tile
    near = made(1, tile, 2, first)
    far = [torch.empty(3, columns, dtype=t.dtype) for t in (near.weight, near.grad)]
    moments = [torch.empty(3, columns // (tile // field.shape[1]), dtype=field.dtype) for field in near.moments]
    for whole, part in zip((*far, *moments), (near.weight, near.grad, *near.moments), strict=True):
        whole[-1, -part.shape[1] :] = part[0]
    step([near])
    addresses = [tensor.data_ptr() for tensor in (*far, *moments)]
    table = torch.tensor([[*addresses, 3, columns, 0, 0, *near.key, 0]])
    tiles = 3 * columns // tile
    kernels.many_kernel[(1,)](
        table,
        torch.tensor([1 - tiles], dtype=torch.int32),  # so that the only program has the last tile
        torch.ones(1, dtype=torch.int32),
        torch.tensor([1e-2, 1 - 1e-4, 10.0, 1000.0]),
        m_levels(torch.device("cpu")),
        roots(torch.device("cpu")),
        None,
        *GROUP,
        1,
        tl.int16,
        tl.int16,
        16,
        1,
        128,
        tile,
    )
    for whole, part in zip((far[0], *moments), (near.weight, *near.moments), strict=True):
        assert torch.equal(whole[-1, -part.shape[1] :], part[0])


# Quotients and roots.


@triton.jit
def quotient_kernel(x_ptr, y_ptr, q_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(q_ptr + i, ieee.quotient(tl.load(x_ptr + i), tl.load(y_ptr + i)))


@triton.jit
def root_kernel(x_ptr, r_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(r_ptr + i, ieee.root(tl.load(x_ptr + i)))


OFF = 0


@triton.jit
def inverse_off(x):
    return as_float(as_int(tl.math.div_rn(1.0, x)) + OFF)


@triton.jit
def inverse_root_off(x):
    return as_float(as_int(tl.math.div_rn(1.0, tl.sqrt_rn(x))) + OFF)


@pytest.mark.parametrize("off", [-2, 0, 2])
def test_roots_of_every_significand_by_a_guess_that_is_off(off, monkeypatch):
    monkeypatch.setitem(globals(), "OFF", off)
    monkeypatch.setattr(ieee, "_inverse_root", inverse_root_off)
    n = 2**20
    for octave in (127, 128):
        for start in range(0, 2**23, 8 * n if off else n):
            x = (torch.arange(start, start + n, dtype=torch.int32) | (octave << 23)).view(FP32)
            found = torch.empty(n)
            root_kernel[(1,)](x, found, n)
            assert torch.equal(found, x.double().sqrt().float())


@pytest.mark.parametrize("off", [-2, -1, 0, 1, 2])
def test_quotients_by_a_guess_that_is_off(off, monkeypatch):
    monkeypatch.setitem(globals(), "OFF", off)
    monkeypatch.setattr(ieee, "_inverse", inverse_off)
    n, gen = 2**19, torch.Generator().manual_seed(off + 2)
    bits = torch.randint(0, 2**23, (2, n), generator=gen, dtype=torch.int32) | (127 << 23)
    x, y = bits.view(FP32)
    x = x * torch.randint(-20, 20, (n,), generator=gen).float().exp2()
    x[:4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    y[4:1028] = 2 - torch.arange(1, 1025) * 2.0**-23  # the hardest of them
    found = torch.empty(n)
    quotient_kernel[(1,)](x, y, found, n)
    assert torch.equal(found.view(torch.int32), (x / y).view(torch.int32))
