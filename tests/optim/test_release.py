import copy

import pytest
import torch
from processes import spawn
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_fp8.optim import FP8AdamW, decay_groups, enable_gradient_release

STEPS = 5


class Net(nn.Module):
    """Tied weights, a vector, quantised matrices, and a parameter that gets no gradient in odd steps."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(32, 128)
        self.hidden = nn.Linear(128, 128)
        self.sometimes = nn.Linear(128, 128, bias=False)
        self.head = nn.Linear(128, 32, bias=False)
        self.head.weight = self.embedding.weight
        self.to(torch.bfloat16)

    def forward(self, tokens, with_all=True):
        x = self.hidden(self.embedding(tokens))
        return self.head(x + self.sometimes(x) if with_all else x)


def loss_of(model, step, rank=0):
    gen = torch.Generator().manual_seed(10 * step + rank)
    tokens = torch.randint(0, 32, (4, 8), generator=gen)
    logits = model(tokens, with_all=step % 2 == 0)
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.roll(1, 1).flatten())


def built(released, model=None):
    model = model or Net()
    optimizer = FP8AdamW(decay_groups(model), lr=0.01)
    return model, optimizer, enable_gradient_release(model, optimizer) if released else None


def train(model, optimizer, steps=STEPS, closure=False, start=0):
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(start, start + steps):

        def compute(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        if closure:
            assert optimizer.step(compute) > 0
        else:
            compute()
            optimizer.step()
        scheduler.step()


def assert_same(model, optimizer, other, other_optimizer):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert optimizer.state[p].keys() == other_optimizer.state[q].keys()
        assert all(torch.equal(v, other_optimizer.state[q][k]) for k, v in optimizer.state[p].items()), name


@pytest.mark.parametrize("closure", [False, True])
def test_it_changes_no_bit(closure):
    """With tied weights, groups, a schedule and a parameter that is not always used."""
    model, optimizer, _ = built(released=False)
    other, released, _ = built(released=True)
    train(model, optimizer, closure=closure)
    train(other, released, closure=closure)
    assert_same(model, optimizer, other, released)
    assert all(p.grad is None for p in other.parameters())
    assert released.state[other.sometimes.weight]["step"] == 3


def test_gradients_are_freed_one_by_one():
    model, _, _ = built(released=True)
    alive = []
    params = list(model.parameters())
    for p in params:  # after our hook, because it was registered before
        p.register_post_accumulate_grad_hook(lambda _: alive.append(sum(q.grad is not None for q in params)))
    loss_of(model, 0).backward()
    assert alive == [0] * len(params)


def test_undone_it_is_gone():
    model, optimizer, _ = built(released=False)
    other, released, handle = built(released=True)
    assert released.gradient_release is handle
    handle.remove()
    assert released.gradient_release is None
    loss_of(other, 0).backward()
    assert all(p.grad is not None for p in other.parameters())
    assert not released.state
    train(model, optimizer)
    train(other, released)
    assert_same(model, optimizer, other, released)
    enable_gradient_release(other, released)


def test_a_run_resumes_with_it():
    model, optimizer, _ = built(released=False)
    train(model, optimizer)
    first, released, _ = built(released=True)
    train(first, released, steps=3)
    second, resumed, _ = built(released=True)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(released.state_dict())
    train(model, optimizer, steps=2, start=STEPS)
    for net, opt in ((first, released), (second, resumed)):
        train(net, opt, steps=2, start=3)
    assert_same(first, released, second, resumed)


def test_a_template_for_a_checkpoint_is_made_with_it():
    """torch.distributed.checkpoint sets gradients of zero and calls step() where no state is."""
    model, optimizer, _ = built(released=True)
    before = copy.deepcopy(model.state_dict())
    get_optimizer_state_dict(model, optimizer)
    assert all(optimizer.state[p] for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_accumulation_is_refused():
    model, optimizer, _ = built(released=True)
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match=r"sometimes\.weight got a second gradient before optimizer\.step\(\)"):
        loss_of(model, 0).backward()
    optimizer.step()
    loss_of(model, 0).backward()


def test_a_gradient_that_is_not_finite_skips_its_parameter_alone():
    layer = nn.Linear(128, 8, dtype=torch.bfloat16)
    weight, bias = (p.detach().clone() for p in (layer.weight, layer.bias))
    optimizer = FP8AdamW(layer.named_parameters(), lr=0.01)
    enable_gradient_release(layer, optimizer)
    layer(torch.full((2, 128), float("inf"), dtype=torch.bfloat16)).sum().backward()
    assert torch.equal(layer.weight, weight)
    assert not torch.equal(layer.bias, bias)
    assert optimizer.skipped_steps == 1
    assert layer.weight.grad is None


def test_what_cannot_work_is_refused_before_training():
    model, optimizer, release = built(released=True)
    release.check(model, gradient_clip_val=None, accumulate_grad_batches=1)
    release.check(model, gradient_clip_val=0.0, accumulate_grad_batches=1)
    with pytest.raises(ValueError, match=r"gradient_clip_val=1\.0"):
        release.check(model, gradient_clip_val=1.0, accumulate_grad_batches=1)
    with pytest.raises(ValueError, match="accumulate_grad_batches=4"):
        release.check(model, gradient_clip_val=None, accumulate_grad_batches=4)
    for again in (optimizer, FP8AdamW(model.parameters())):  # a second optimizer would silently step nothing
        with pytest.raises(ValueError, match=r"enabled already for embedding\.weight; call remove\(\)"):
            enable_gradient_release(model, again)
    with pytest.raises(ValueError, match="SGD cannot"):
        enable_gradient_release(model, torch.optim.SGD(model.parameters()))


def test_ddp_is_refused_whichever_comes_first(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        model, optimizer, release = built(released=True)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            release.check(wrapped, gradient_clip_val=None, accumulate_grad_batches=1)
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            loss_of(wrapped, 0)
        release.remove()
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            enable_gradient_release(wrapped, optimizer)
        loss_of(wrapped, 0).backward()
    finally:
        torch.distributed.destroy_process_group()


def under_fsdp(folder):
    """Both ranks: released and plain steps are the same, on gradients that differ between ranks."""
    mesh = init_device_mesh("cpu", (2,))
    rank = mesh.get_local_rank()
    trained = []
    for released in (False, True):
        model = Net()
        for layer in (model.hidden, model.sometimes):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model, optimizer, _ = built(released, model)
        for step in range(0, 2 * STEPS, 2):
            loss_of(model, step, rank).backward()
            assert all((p.grad is None) is released for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        trained.append((model, optimizer))
    (model, optimizer), (other, released) = trained
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local())
        assert optimizer.state[p]["step"] == released.state[q]["step"] == STEPS


def test_fsdp_steps_on_reduced_gradients(tmp_path):
    spawn(under_fsdp, 2, tmp_path)
