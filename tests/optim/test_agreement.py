"""What the processes of a sharded parameter must decide alike, in two real processes."""

import pytest
import torch
import torch.distributed as dist
from processes import spawn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_fp8.optim import FP8AdamW, FP8Optimizer, enable_gradient_release, finite
from lightning_fp8.optim.shards import true_everywhere

SHAPES = {"ragged": (10, 300), "uneven": (5, 128), "one": (1, 128), "vector": (11,), "narrow": (9, 8)}
KINDS = {
    "FP8AdamW": lambda params, **options: FP8AdamW(params, lr=0.01, **options),
    "clipped": lambda params, **options: FP8AdamW(params, lr=0.01, clip_update_rms=0.5, **options),
    "FP8Optimizer": lambda params, **options: FP8Optimizer(torch.optim.NAdam(params, lr=0.01), **options),
}
STEPS, BAD = 5, 2  # steps in all, and the one whose gradient is not finite


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=gen).bfloat16()))


def set_grads(model, step):
    """Gradients that depend on the step and the name alone; those of a spike at the end."""
    for name, p in model.named_parameters():
        gen = torch.Generator().manual_seed(1000 * step + len(name))
        grad = (torch.randn(p.shape, generator=gen) * (10 if step == STEPS - 1 else 1)).bfloat16()
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad


def reference(kind):
    """A run of one process that never saw the bad step."""
    model = Model()
    optimizer = KINDS[kind](model.named_parameters())
    for step in range(STEPS):
        set_grads(model, step)
        if step != BAD:
            optimizer.step()
    return model, optimizer


def gathered(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def assert_same(model, optimizer, other, other_optimizer):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(gathered(p), q), name
        state, expected = optimizer.state[p], other_optimizer.state[q]
        assert state.keys() == expected.keys()
        for key, value in state.items():
            assert torch.equal(gathered(value), expected[key]), (name, key)


def on_two(folder):
    mesh = init_device_mesh("cpu", (2,))
    for free in (("cpu",), ()):  # the path of CPUs, and the one that asks no device
        finite._FREE_TO_READ = free
        for kind in KINDS:
            one_bad_shard_skips_the_step_everywhere(kind, mesh)
        one_bad_shard_skips_a_released_parameter_everywhere(mesh)
    all_raise_together(mesh)
    copies_agree_too(init_device_mesh("cpu", (2, 1)))


def one_bad_shard_skips_the_step_everywhere(kind, mesh):
    model = Model()
    fully_shard(model, mesh=mesh)
    optimizer = KINDS[kind](model.named_parameters())
    for step in range(STEPS):
        set_grads(model, step)
        if step == BAD and dist.get_rank() == 1:
            model.uneven.grad.to_local()[-1, -1] = float("nan")
        optimizer.step()
    assert optimizer.skipped_steps == 1
    optimizer.state_dict()
    assert_same(model, optimizer, *reference(kind))


def one_bad_shard_skips_a_released_parameter_everywhere(mesh):
    torch.manual_seed(0)
    model = nn.Linear(128, 8, bias=False, dtype=torch.bfloat16)
    fully_shard(model, mesh=mesh)
    before = model.weight.to_local().clone()
    optimizer = FP8AdamW(model.named_parameters())
    enable_gradient_release(model, optimizer)
    grad = torch.ones(2, 8, dtype=torch.bfloat16)
    grad[:, 0] = float("inf")  # of the first row of the weight, which the first process holds
    model(torch.ones(2, 128, dtype=torch.bfloat16)).backward(grad)
    assert optimizer.state[model.weight]["step"] == 0 if optimizer.state[model.weight] else True
    assert torch.equal(model.weight.to_local(), before)
    assert optimizer.skipped_steps == 1


def all_raise_together(mesh):
    for kind in KINDS:
        model = Model()
        fully_shard(model, mesh=mesh)
        optimizer = KINDS[kind](model.named_parameters(), max_skipped_steps=2)
        set_grads(model, 0)
        if dist.get_rank() == 1:
            model.ragged.grad.to_local()[0, 0] = float("inf")
        optimizer.step()
        with pytest.raises(FloatingPointError, match="the gradients of 2 steps in a row held NaN"):
            optimizer.step()


def copies_agree_too(mesh):
    """Of a mesh all dimensions count, those along which a parameter is replicated as well."""
    p = distribute_tensor(torch.ones(4, 128), mesh, [Replicate(), Shard(0)])
    for bad in (0, 1, None):
        flag = torch.tensor(dist.get_rank() != bad)
        assert bool(true_everywhere(flag, [torch.ones(1), p])) is (bad is None)
        assert bool(true_everywhere(flag, [torch.ones(1)])) is bool(flag)  # nothing is shared


def test_processes_decide_alike(tmp_path):
    spawn(on_two, 2, tmp_path)
