"""FP8 gradient reduction in real processes over gloo. Each spawn runs several checks: starting up takes longer."""

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from ranks import spawn
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_fp8.distributed import FP8GradientReduction
from lightning_fp8.distributed.reduction import bytes_sent

SIZES = {"matrix": (37, 53), "one": (1,), "none": (0,), "vector": (129,), "zero_dim": ()}
_NOT_EMPTY = [0, 1, 3, 4]


class Given(nn.Module):
    """Parameters whose gradients are whatever is put into them."""

    def __init__(self) -> None:
        super().__init__()
        for name, size in SIZES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(size)))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return torch.stack([(p * gradients[name]).sum() for name, p in self.named_parameters()]).sum()


def gradients(seed: int, magnitude: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=generator) * magnitude for name, size in SIZES.items()}


def reduced(ddp: Any, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients after one backward pass, checked to be the same bits on every rank."""
    ddp.zero_grad()
    ddp(own).backward()
    found = {name: p.grad.clone() for name, p in ddp.module.named_parameters()}
    flat = torch.cat([g.flatten() for g in found.values()]).view(torch.int32)
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, flat)
    assert all(torch.equal(flat, other) for other in everyone)
    return found


@contextmanager
def traffic():
    """Records what is sent: (collective, bytes of its input)."""
    sent: list[tuple[str, int]] = []
    names = {"all_reduce": 0, "all_to_all_single": 1, "all_gather_into_tensor": 1}
    originals = {name: getattr(dist, name) for name in names}

    def recording(name: str, position: int) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent.append((name, args[position].nbytes))
            return originals[name](*args, **kwargs)

        return call

    for name, position in names.items():
        setattr(dist, name, recording(name, position))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def check_gradients(_: Path) -> None:
    rank, ways = dist.get_rank(), dist.get_world_size()
    ddp = DistributedDataParallel(Given())
    reduction = FP8GradientReduction(ddp)
    for step, magnitude in enumerate([1.0, 1e-20, 1e20, 1.0]):
        everyone = [gradients(10 * step + r, magnitude) for r in range(ways)]
        found = reduced(ddp, everyone[rank])
        for name, g in found.items():
            parts = torch.stack([own[name] for own in everyone]).double()
            # E4M3's bound, twice 2^-4 and a subnormal, for values that all lie in the format's range.
            floor = parts.abs().max() / 448 * 2.0**-10 if g.numel() else 0
            limit = (parts.abs().mean(0) / 16 + floor) * (1 + 2**-4) + parts.mean(0).abs() / 16 + floor
            assert ((g - parts.mean(0)).abs() <= limit * (1 + 1e-6)).all(), (name, magnitude)
            assert ways == 1 or not g.numel() or (g != parts.mean(0)).any()
    assert reduction.names == list(SIZES)
    assert reduction.counts[:, 2].tolist() == [4 * (ways + 1) * torch.Size(s).numel() for s in SIZES.values()]
    assert torch.allclose(reduction.headroom, torch.full((5,), 2 ** (4 / 1000) / ways))

    ones = {name: torch.ones(size) for name, size in SIZES.items()}
    zeros = {name: torch.zeros(size) for name, size in SIZES.items()}
    found = reduced(ddp, ones if rank == 0 else zeros)
    assert all(torch.allclose(g, torch.full_like(g, 1 / ways), rtol=2**-4) for g in found.values())

    bad = gradients(rank)
    if rank == ways - 1:
        bad["vector"][5] = torch.nan
    found = reduced(ddp, bad)
    assert found["vector"].isnan().all()
    assert found["matrix"].isfinite().all()
    before = reduction.counts.clone()
    assert before[3, :2].tolist() == [0, 0]

    with ddp.no_sync():  # accumulated locally, reduced once
        ddp.zero_grad()
        ddp(ones).backward()
    ddp(ones).backward()
    assert all(torch.allclose(p.grad, torch.full_like(p, 2.0), rtol=2**-3) for p in ddp.module.parameters())
    assert torch.equal(reduction.counts[:, 2] - before[:, 2], before[:, 2] // 6)


def check_saturation(_: Path) -> None:
    """Ranks that agree cannot have more headroom than 1 / N; what was too much is halved, on all ranks alike."""
    ways = dist.get_world_size()
    ddp = DistributedDataParallel(Given())
    reduction = FP8GradientReduction(ddp)
    reduction.headroom.fill_(1.0)
    found = reduced(ddp, gradients(0))
    same = gradients(0)
    peak = same["matrix"].abs().argmax()
    assert torch.allclose(found["matrix"].flatten()[peak], same["matrix"].flatten()[peak] / ways)
    assert reduction.rates()["saturation"] > 0
    assert torch.allclose(reduction.headroom[_NOT_EMPTY], torch.tensor(0.5))
    for _ in range(4):
        reduced(ddp, gradients(0))
    assert (reduction.headroom[_NOT_EMPTY] < 1.01 / ways).all()


def check_state(_: Path) -> None:
    """Goes on bit for bit from a saved state, also where DDP forms other buckets."""
    rank = dist.get_rank()
    first = DistributedDataParallel(Given())
    reduction = FP8GradientReduction(first)
    for step in range(3):
        reduced(first, gradients(step * 7 + rank))
    reduction.headroom.mul_(1.3)  # where rounding depends on it
    saved = reduction.state_dict()
    wanted = reduced(first, gradients(99 + rank))
    second = DistributedDataParallel(Given(), bucket_cap_mb=0.001)
    again = FP8GradientReduction(second)
    again.load_state_dict(saved)
    found = reduced(second, gradients(99 + rank))
    assert all(torch.equal(found[name], wanted[name]) for name in SIZES)
    assert torch.equal(again.counts, reduction.counts)
    assert torch.equal(again.headroom, reduction.headroom)
    assert not torch.equal(saved["headroom"], reduction.headroom)  # a copy
    partial = {**saved, "names": saved["names"][:1], "headroom": saved["headroom"][:1], "counts": saved["counts"][:1]}
    again.load_state_dict(partial)
    with pytest.raises(ValueError, match="upgrade lightning-fp8"):
        again.load_state_dict({**saved, "version": 2})


def check_bytes(_: Path) -> None:
    """Counted at the collectives, on a layer of 0.3 M parameters: half of bf16's, and what `bytes_sent` says."""
    ways = dist.get_world_size()
    layer = nn.Linear(512, 512)
    ddp = DistributedDataParallel(layer)
    FP8GradientReduction(ddp)
    with traffic() as sent:
        ddp(torch.randn(4, 512)).sum().backward()
    kinds = dict(sent)
    assert len(sent) == 3
    # A rank keeps its own part of an all-to-all; a ring gathers in N - 1 sends, and reduces in 2 (N - 1) of N-ths.
    total = kinds["all_to_all_single"] * (ways - 1) / ways + kinds["all_gather_into_tensor"] * (ways - 1)
    total += kinds["all_reduce"] * 2 * (ways - 1) / ways
    elements = 512 * 512 + 512
    assert total == bytes_sent(elements, 2, ways)
    assert total <= 0.55 * 2 * (ways - 1) / ways * 2 * elements


def check_fabric(folder: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    torch.manual_seed(0)
    bare = nn.Linear(32, 16)
    model, optimizer = fabric.setup(bare, torch.optim.AdamW(bare.parameters()))
    reduction = FP8GradientReduction(model)
    fabric.backward(model(torch.randn(4, 32)).square().sum())
    optimizer.step()
    fabric.save(folder / "fabric.ckpt", {"model": model, "reduction": reduction})
    saved = torch.load(folder / "fabric.ckpt", weights_only=True)["reduction"]
    assert torch.equal(saved["headroom"], reduction.headroom)
    assert saved["names"] == ["weight", "bias"]
    reduction.headroom.fill_(0.7)
    fabric.load(folder / "fabric.ckpt", {"model": model, "reduction": reduction})
    assert torch.equal(saved["headroom"], reduction.headroom)


def check_refusals(_: Path) -> None:
    with pytest.raises(ValueError, match=r"this model is a Linear\. Wrap it first"):
        FP8GradientReduction(nn.Linear(2, 2))
    sharded = fully_shard(nn.Linear(16, 16))
    with pytest.raises(ValueError, match="FSDP2 reduces gradients by itself"):
        FP8GradientReduction(sharded)
    with pytest.raises(ValueError, match="'e3m4' is not one of e4m3, e5m2"):
        FP8GradientReduction(DistributedDataParallel(nn.Linear(2, 2)), "e3m4")


def check_all(folder: Path) -> None:
    check_gradients(folder)
    if dist.get_world_size() > 1:
        check_saturation(folder)
        check_state(folder)
        check_bytes(folder)


def check_two(folder: Path) -> None:
    check_all(folder)
    check_refusals(folder)
    check_fabric(folder)


def test_two_processes(tmp_path: Path) -> None:
    spawn(check_two, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ways", [3, 4])
def test_more_processes(tmp_path: Path, ways: int) -> None:
    spawn(check_all, ways, tmp_path)


def test_one_process_changes_nothing(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(Given())
        reduction = FP8GradientReduction(ddp)
        found = reduced(ddp, gradients(0))
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(found[name], g) for name, g in gradients(0).items())
    assert reduction.counts.sum() == 0
    assert reduction.rates() == {"saturation": 0, "underflow": 0}


def learn(seed: int, hook: str) -> float:
    """The loss, on fresh data, of a small network that has learnt another's outputs from 2 ranks' data."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
    torch.manual_seed(seed)
    student = DistributedDataParallel(nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)))
    if hook == "fp8":
        FP8GradientReduction(student)
    elif hook == "bf16":
        student.register_comm_hook(None, bf16_compress_hook)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    data = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    for _ in range(400):
        x = torch.randn(32, 32, generator=data)
        loss = (student(x) - teacher(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return float((student.module(x) - teacher(x)).square().mean().log())


def compare(folder: Path) -> None:
    seeds = range(5)
    losses = {hook: torch.tensor([learn(seed, hook) for seed in seeds]) for hook in ("bf16", "fp8")}
    if dist.get_rank() == 0:
        torch.save(losses, folder / "losses.pt")


@pytest.mark.slow
def test_training_learns_what_it_does_with_bf16(tmp_path: Path) -> None:
    """Paired by seed: the mean difference of the log loss is less than what seeds make of it."""
    spawn(compare, 2, tmp_path)
    losses = torch.load(tmp_path / "losses.pt")
    noise = losses["bf16"].std()
    print(losses, noise)
    assert (losses["fp8"] - losses["bf16"]).mean().abs() < noise
    assert losses["fp8"].max() < -2  # an untrained student is near 0
