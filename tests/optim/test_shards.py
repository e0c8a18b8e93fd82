"""Sharded parameters, in real processes: what a step does must not depend on how they are cut."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import spawn
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_fp8.optim import FP8AdamW, FP8Optimizer, blocks, shards
from lightning_fp8.optim.ledger import measure_ledger

SHAPES = {  # ragged last blocks, uneven shards, experts, a convolution, fewer rows than processes, fp32 moments
    "ragged": (10, 300),
    "experts": (5, 3, 128),
    "conv": (5, 16, 3, 3),
    "few": (2, 128),
    "vector": (11,),
    "narrow": (9, 8),
}
FULL = StateDictOptions(full_state_dict=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
SIZE = 128


class Model(nn.Module):
    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=gen).to(dtype)))


def train(model, optimizer, steps):
    """Steps on gradients that depend on the step and the name alone, cut as the parameters are."""
    for step in steps:
        for name, p in model.named_parameters():
            gen = torch.Generator().manual_seed(1000 * step + len(name))
            grad = torch.randn(p.shape, generator=gen).to(p.dtype)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        optimizer.step()


KINDS = {
    "FP8AdamW": lambda params, **options: FP8AdamW(params, lr=0.01, **options),
    "FP8-LM": lambda params, **o: FP8AdamW(params, lr=0.01, moments="fp8_lm", rounding="scaled_fp16", **o),
    "FP8Optimizer": lambda params, **options: FP8Optimizer(torch.optim.NAdam(params, lr=0.01), **options),
}


every_kind = pytest.mark.parametrize("kind", KINDS)


def fresh(kind, mesh=None):
    model = Model()
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    return model, KINDS[kind](model.named_parameters())


def whole(model, optimizer):
    """Weights and state, gathered."""
    weights = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return {
        "weights": {name: p.detach().clone() for name, p in weights.items()},
        "state": get_optimizer_state_dict(model, optimizer, options=FULL)["state"],
    }


def load_weights(model, weights):
    with torch.no_grad():
        for name, p in model.named_parameters():
            w = weights[name]
            p.copy_(distribute_tensor(w, p.device_mesh, p.placements) if isinstance(p, DTensor) else w)


def assert_same(actual, expected, where=""):
    assert type(actual) is type(expected), where
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(actual[key], value, f"{where}.{key}")
    else:
        assert actual.dtype is expected.dtype, where
        assert torch.equal(actual, expected), where


@functools.cache
def unsharded(kind, steps):
    model, optimizer = fresh(kind)
    train(model, optimizer, range(steps))
    return whole(model, optimizer)


def unsharded_ledger(kind, ways):
    model, optimizer = fresh(kind)
    train(model, optimizer, range(3))
    return measure_ledger(model.parameters(), [optimizer], ways=ways)


def resume_from_shards(folder, model, optimizer):
    """What a user does: a template from the fresh optimizer, filled from the checkpoint, given back."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = get_optimizer_state_dict(model, optimizer)
    # the template comes of a step with zero gradients and a learning rate of 0
    assert all(torch.equal(shards.local_part(p), shards.local_part(before[n])) for n, p in model.named_parameters())
    dcp.load({"optimizer": state}, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, state)


def check_placements(model, optimizer):
    for name, p in model.named_parameters():
        quantized = len(SHAPES[name]) > 1 and name != "narrow"
        for key, value in optimizer.state[p].items():
            if key in ("step", "mu_product"):
                assert type(value) is torch.Tensor
                continue
            assert isinstance(value, DTensor)
            assert (value.placements, value.device_mesh) == (p.placements, p.device_mesh)
            assert value.is_contiguous()
            if quantized and not key.endswith(("codes", "half", "master")):
                leading = blocks.row_dimensions(p.shape)
                columns = blocks.matrix_shape(p.shape)[1]
                assert value.shape == (*p.shape[:leading], blocks.blocks_per_row(columns, SIZE))
                assert value.to_local().shape[0] == p.to_local().shape[0]
            else:
                assert value.shape == p.shape
                assert value.to_local().shape == p.to_local().shape
        assert ("m_codes" in optimizer.state[p]) is quantized, name


def on_three(folder):
    # A mesh is made by every process, also by those that are not in it.
    two, three = DeviceMesh("cpu", [0, 1]), init_device_mesh("cpu", (3,))
    if dist.get_rank() < 2:
        for kind in KINDS:
            write(kind, two, folder / kind)
        columns_may_be_cut_between_blocks(two)
        rows_may_be_cut_in_any_dimension(two)
        values_may_be_cut_otherwise(two)
    dist.barrier()
    for kind in KINDS:
        read(kind, three, folder / kind)


def write(kind, mesh, folder):
    model, optimizer = fresh(kind, mesh)
    train(model, optimizer, range(3))
    check_placements(model, optimizer)
    assert_same(whole(model, optimizer), unsharded(kind, 3))
    if mesh.get_local_rank() == 0:  # what the estimate of a sharded model promises, without running one
        plain = unsharded_ledger(kind, ways=2)
        assert optimizer.memory() == plain
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / "sharded", process_group=mesh.get_group())


def values_may_be_cut_otherwise(mesh):
    value = torch.arange(12.0).view(4, 3)
    p = distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)])
    for placement in (Shard(0), Shard(1), Replicate()):
        moved = shards.cut_alike(distribute_tensor(value, mesh, [placement]), p)
        assert moved.placements == p.placements
        assert torch.equal(moved.full_tensor(), value)
        assert torch.equal(shards.cut_alike(moved, torch.zeros(4, 3)), value)


def columns_may_be_cut_between_blocks(mesh):
    plain = nn.Parameter(torch.randn(6, 512, generator=torch.Generator().manual_seed(1)).bfloat16())
    cut = nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, [Shard(1)]))
    assert_steps_alike(plain, cut)
    # 64 columns are quantised, and so is the half of them that a process holds.
    narrow = nn.Parameter(torch.randn(6, 64, generator=torch.Generator().manual_seed(1)).bfloat16())
    assert_steps_alike(narrow, nn.Parameter(distribute_tensor(narrow.detach(), mesh, [Shard(1)])), block_size=16)
    ragged = nn.Parameter(distribute_tensor(torch.ones(6, 384), mesh, [Shard(1)]))
    with pytest.raises(
        ValueError, match=r"shape \(6, 384\) is sharded 2 ways along its 384 columns, which cuts blocks of 128"
    ):
        FP8AdamW([ragged]).allocate()
    conv = nn.Parameter(distribute_tensor(torch.ones(4, 16, 4, 4), mesh, [Shard(2)]))
    with pytest.raises(ValueError, match=r"shape \(4, 16, 4, 4\) is sharded as \(4, 16, 2, 4\)"):
        FP8AdamW([conv]).allocate()


def rows_may_be_cut_in_any_dimension(mesh):
    plain = nn.Parameter(torch.randn(3, 5, 130, generator=torch.Generator().manual_seed(1)).bfloat16())
    assert_steps_alike(plain, nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, [Shard(1)])))


def assert_steps_alike(plain, cut, **options):
    before = plain.detach().clone()
    for kind in KINDS.values():
        plain.data.copy_(before)
        cut.data.copy_(distribute_tensor(before, cut.device_mesh, cut.placements))
        steps_alike(plain, cut, [kind([("w", p)], **options) for p in (plain, cut)])


def steps_alike(plain, cut, optimizers):
    for step in range(3):
        plain.grad = torch.randn(plain.shape, generator=torch.Generator().manual_seed(step)).bfloat16()
        cut.grad = distribute_tensor(plain.grad, cut.device_mesh, cut.placements)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(cut.full_tensor(), plain)
    for key, value in optimizers[1].state[cut].items():
        gathered = value.full_tensor() if isinstance(value, DTensor) else value
        assert_same(gathered, optimizers[0].state[plain][key], key)


def read(kind, mesh, folder):
    model, optimizer = fresh(kind, mesh)
    train(model, optimizer, range(3))
    assert_same(whole(model, optimizer), unsharded(kind, 3))

    model, optimizer = fresh(kind, mesh)
    load_weights(model, unsharded(kind, 3)["weights"])
    resume_from_shards(folder / "sharded", model, optimizer)
    check_placements(model, optimizer)
    assert_same(whole(model, optimizer), unsharded(kind, 3))
    train(model, optimizer, range(3, 5))
    assert_same(whole(model, optimizer), unsharded(kind, 5))

    # A whole state dict, through torch.distributed and without it.
    plain, plain_optimizer = fresh(kind)
    train(plain, plain_optimizer, range(3))
    full = get_optimizer_state_dict(plain, plain_optimizer)
    for load in (
        lambda m, o: set_optimizer_state_dict(m, o, full if dist.get_rank() == 0 else {}, options=BROADCAST),
        lambda m, o: o.load_state_dict(plain_optimizer.state_dict()),
    ):
        model, optimizer = fresh(kind, mesh)
        load_weights(model, unsharded(kind, 3)["weights"])
        load(model, optimizer)
        check_placements(model, optimizer)
        assert_same(whole(model, optimizer), unsharded(kind, 3))


def test_steps_and_checkpoints_do_not_depend_on_the_number_of_processes(tmp_path):
    """2 processes write; 3 and 1 read, bit for bit, and go on as a run that was never sharded."""
    spawn(on_three, 3, tmp_path)
    for kind in KINDS:
        model, optimizer = fresh(kind)
        load_weights(model, unsharded(kind, 3)["weights"])
        resume_from_shards(tmp_path / kind / "sharded", model, optimizer)
        assert_same(whole(model, optimizer), unsharded(kind, 3))
        train(model, optimizer, range(3, 5))
        assert_same(whole(model, optimizer), unsharded(kind, 5))


@every_kind
def test_torch_distributed_checkpoints_keep_every_bit_of_a_plain_model(kind, tmp_path):
    model, optimizer = fresh(kind)
    train(model, optimizer, range(3))
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)
    other, resumed = fresh(kind)
    load_weights(other, unsharded(kind, 3)["weights"])
    resume_from_shards(tmp_path, other, resumed)
    assert_same(whole(other, resumed), unsharded(kind, 3))


@every_kind
@pytest.mark.parametrize("flat", [False, True])
def test_state_dicts_with_names_load(kind, flat):
    model, optimizer = fresh(kind)
    train(model, optimizer, range(3))
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    other, resumed = fresh(kind)
    load_weights(other, unsharded(kind, 3)["weights"])
    set_optimizer_state_dict(other, resumed, state, options=options)
    assert_same(whole(other, resumed), unsharded(kind, 3))


def place(shape):
    return shards.place_of(torch.empty(shape))


@pytest.mark.parametrize("block_size", [1, 32, SIZE])
def test_positions_name_the_place_of_every_block(block_size):
    shapes = [(7,), (3, 256), (4, 129), (8, 16, 3, 3), (2, 3, 200)]
    places = [place(shape) for shape in shapes]
    sizes = [rows * columns for (rows, columns) in (p.shape for p in places)]
    values = torch.arange(1, 1 + sum(sizes), dtype=torch.float32).split(sizes)
    tensors = [value.view(p.shape) for value, p in zip(values, places, strict=True)]
    rows = [blocks.Rows(i, min(1, t.shape[0] - 1), t.shape[0]) for i, t in enumerate(tensors)]
    gathered = blocks.gather(tensors, rows, block_size)
    owners, row, first_column = shards.positions(rows, places, block_size, torch.device("cpu"))
    assert owners.dtype is row.dtype is first_column.dtype is torch.int32
    assert first_column.shape == (len(gathered), 1)
    for block, i, r, (c,) in zip(gathered, owners.tolist(), row.tolist(), first_column.tolist(), strict=True):
        expected = tensors[i][r, c : c + block_size]
        assert torch.equal(block[: len(expected)], expected)
        assert not block[len(expected) :].any()


def test_one_number_a_block_goes_with_its_block():
    places = [place((4, columns)) for columns in (300, 128, 129)]
    scales = [torch.rand(4, blocks.blocks_per_row(p.shape[1], SIZE)) + 1 for p in places]
    rows = [blocks.Rows(0, 1, 3), blocks.Rows(1, 0, 4), blocks.Rows(2, 2, 3)]
    gathered = blocks.gather(scales, rows, 1)
    owners, row, first_column = shards.positions(rows, places, SIZE, torch.device("cpu"))
    where = zip(owners.tolist(), row.tolist(), (first_column[:, 0] // SIZE).tolist(), strict=True)
    assert gathered[:, 0].tolist() == [scales[i][r, b].item() for i, r, b in where]
