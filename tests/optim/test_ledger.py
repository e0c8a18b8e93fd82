import pytest
import torch
from torch import nn

from lightning_fp8.optim import FP8AdamW, FP8Optimizer, decay_groups
from lightning_fp8.optim.estimate import MODES, Mode, estimate
from lightning_fp8.optim.ledger import Ledger, measure_ledger

ROWS, COLUMNS = 6, 256
COUNT = ROWS * COLUMNS + ROWS  # a matrix and a bias


def ledger_of(params, optimizers=(), **options):
    """(weights, grads, moments, scales), bytes a parameter."""
    ledger = measure_ledger(params, optimizers, **options)
    return ledger.weights, ledger.grads, ledger.moments, ledger.scales


def trained(dtype: torch.dtype, optimizer: type[torch.optim.Optimizer], **options: object) -> Ledger:
    model = nn.Linear(COLUMNS, ROWS, dtype=dtype)
    made = optimizer(model.parameters(), **options)
    model(torch.ones(1, COLUMNS, dtype=dtype)).sum().backward()
    made.step()
    return measure_ledger(model.parameters(), [made])


@pytest.mark.parametrize(
    ("dtype", "optimizer", "options", "weights", "moments"),
    [
        (torch.float32, torch.optim.SGD, {}, 4, 0),
        (torch.float32, torch.optim.SGD, {"momentum": 0.9}, 4, 4 * COUNT),
        (torch.float32, torch.optim.AdamW, {}, 4, 8 * COUNT + 2 * 4),  # two fp32 step counters
        (torch.bfloat16, torch.optim.AdamW, {}, 2, 4 * COUNT + 2 * 4),
        # matrix: a byte each for m and v, per block of 128 two bytes and an fp32; bias: fp32; two int64 counters
        (torch.bfloat16, FP8AdamW, {}, 2, 2 * ROWS * COLUMNS + 2 * ROWS * 8 + 8 * ROWS + 2 * 8),
        (torch.bfloat16, FP8AdamW, {"moments": "fp32"}, 2, 8 * COUNT + 2 * 8),
    ],
)
def test_ledger_is_exact(
    dtype: torch.dtype, optimizer: type[torch.optim.Optimizer], options: dict[str, object], weights: int, moments: int
) -> None:
    ledger = trained(dtype, optimizer, **options)
    assert (ledger.weights, ledger.grads, ledger.parameters) == (weights, weights, COUNT)
    assert ledger.moments + ledger.scales == pytest.approx(moments / COUNT, abs=1e-12)
    assert ledger.total == pytest.approx(2 * weights + moments / COUNT)
    assert ledger.total_bytes == pytest.approx(2 * weights * COUNT + moments)


def test_nothing_exists_before_the_first_step() -> None:
    model = nn.Linear(4, 4)
    assert ledger_of(model.parameters(), [torch.optim.AdamW(model.parameters())]) == (4, 0, 0, 0)


def test_only_the_parameters_asked_for_count() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 8, bias=False))
    model(torch.ones(1, 4)).sum().backward()
    model[1].weight.grad = None
    assert ledger_of(model[0].parameters()) == (4, 4, 0, 0)
    assert ledger_of(model[1].parameters()) == (4, 0, 0, 0)


def test_shared_storages_count_once() -> None:
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    second.weight = first.weight  # tied: one parameter
    assert ledger_of([first.weight, second.weight]) == (4, 0, 0, 0)
    second.weight = nn.Parameter(first.weight.detach())  # two parameters, one storage
    assert ledger_of([first.weight, second.weight]) == (2, 0, 0, 0)


def test_a_model_without_parameters() -> None:
    assert ledger_of([]) == (0, 0, 0, 0)


def test_scales_and_moments_are_told_apart() -> None:
    ledger = trained(torch.bfloat16, FP8AdamW)
    assert ledger.moments == (2 * ROWS * COLUMNS + 8 * ROWS) / COUNT
    assert ledger.scales == pytest.approx((2 * ROWS * 8 + 2 * 8) / COUNT)


@pytest.mark.parametrize("wrapped", [False, True])
def test_optimizers_report_their_own(wrapped: bool) -> None:
    model = nn.Linear(COLUMNS, ROWS, dtype=torch.bfloat16)
    optimizer = FP8Optimizer(torch.optim.AdamW(model.parameters())) if wrapped else FP8AdamW(model.parameters())
    model(torch.ones(1, COLUMNS, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert optimizer.memory() == trained(torch.bfloat16, FP8AdamW)


class Net(nn.Module):
    """Matrices with ragged blocks, a convolution, experts, tied weights and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(51, 200)
        self.hidden = nn.Linear(200, 300)
        self.head = nn.Linear(200, 51, bias=False)
        self.head.weight = self.embedding.weight
        self.conv = nn.Conv2d(16, 5, 3)
        self.experts = nn.Parameter(torch.ones(3, 7, 130))


CONFIGURED = [
    Mode("sgd", torch.float32, lambda groups: torch.optim.SGD(groups, momentum=0.9)),
    Mode("fused", torch.bfloat16, lambda groups: torch.optim.AdamW(groups, fused=True)),
    Mode("wrapped", torch.bfloat16, lambda groups: FP8Optimizer(torch.optim.Adagrad(groups))),
    Mode(
        "small blocks",
        torch.bfloat16,
        lambda groups: FP8Optimizer(torch.optim.SGD(groups, momentum=0.9), block_size=32),
    ),
]


@pytest.mark.parametrize("mode", [*MODES, *CONFIGURED], ids=lambda mode: mode.name)
def test_an_estimate_is_what_training_measures(mode: Mode) -> None:
    with torch.device("meta"):
        net = Net()
    expected = estimate(net, mode)
    model = Net().to(mode.dtype)
    optimizer = mode.optimizer(decay_groups(model))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    if mode.release:
        optimizer.zero_grad()
    measured = measure_ledger(model.parameters(), [optimizer])
    assert measured.parameters == expected.parameters
    for name in ("weights", "grads", "moments", "scales", "total"):
        # torch's own count steps in one scalar a parameter too, so there is nothing left to differ
        assert getattr(expected, name) == pytest.approx(getattr(measured, name), rel=1e-12), name


def test_an_estimate_leaves_no_real_tensor() -> None:
    with torch.device("meta"):
        model = nn.Linear(1 << 20, 1 << 17)  # 275 GB in bf16
    ledger = estimate(model, MODES[2])
    assert ledger.parameters == (1 << 37) + (1 << 17)
    assert ledger.total == pytest.approx(2 + 2 + 2 + 8 / 128, rel=1e-3)


@pytest.mark.parametrize("ways", [2, 3, 5])
def test_the_part_of_a_rank_is_that_of_the_largest_shard(ways: int) -> None:
    with torch.device("meta"):
        net = Net()
    ledger = estimate(net, MODES[0], ways=ways)
    parts = [torch.chunk(torch.empty(p.shape, device="meta"), ways)[0].numel() for p in net.parameters()]
    assert ledger.parameters == sum(parts)
    assert ledger.weights == ledger.grads == 4
    # every tensor is cut as its parameter is, but for torch's step counters
    assert ledger.moments == 8
    assert ledger.scales == pytest.approx(4 * len(parts) / sum(parts))
