import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lightning_fp8.models import Decoder, DecoderConfig
from lightning_fp8.models.accounting import FlopCounter, Ledger, measure_ledger
from lightning_fp8.optim import FP8AdamW

ROWS, COLUMNS = 6, 256
COUNT = ROWS * COLUMNS + ROWS  # a matrix and a bias


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
        # matrix: a byte each for m and v, per block of 128 one byte and two fp32; bias: fp32; two int64 counters
        (torch.bfloat16, FP8AdamW, {}, 2, 2 * ROWS * COLUMNS + 2 * ROWS * 6 + 8 * ROWS + 2 * 8),
        (torch.bfloat16, FP8AdamW, {"moments": "fp32"}, 2, 8 * COUNT + 2 * 8),
    ],
)
def test_ledger_is_exact(
    dtype: torch.dtype, optimizer: type[torch.optim.Optimizer], options: dict[str, object], weights: int, moments: int
) -> None:
    ledger = trained(dtype, optimizer, **options)
    assert ledger == Ledger(weights, weights, moments / COUNT)
    assert ledger.total == pytest.approx(2 * weights + moments / COUNT)


def test_nothing_exists_before_the_first_step() -> None:
    model = nn.Linear(4, 4)
    assert measure_ledger(model.parameters(), [torch.optim.AdamW(model.parameters())]) == Ledger(4, 0, 0)


def test_only_the_parameters_asked_for_count() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 8, bias=False))
    model(torch.ones(1, 4)).sum().backward()
    model[1].weight.grad = None
    assert measure_ledger(model[0].parameters(), []) == Ledger(4, 4, 0)
    assert measure_ledger(model[1].parameters(), []) == Ledger(4, 0, 0)


def test_shared_storages_count_once() -> None:
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    second.weight = first.weight  # tied: one parameter
    assert measure_ledger([first.weight, second.weight], []) == Ledger(4, 0, 0)
    second.weight = nn.Parameter(first.weight.detach())  # two parameters, one storage
    assert measure_ledger([first.weight, second.weight], []) == Ledger(2, 0, 0)


def test_a_model_without_parameters() -> None:
    assert measure_ledger([], []) == Ledger(0, 0, 0)


def test_flop_counter_counts_what_torch_counts() -> None:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(vocab_size=64, hidden_size=64, num_layers=2, intermediate_size=96))
    tokens, counts = torch.randint(64, (2, 16)), []
    for counter in (FlopCounter(), FlopCounterMode(display=False)):
        with counter:
            decoder(tokens).sum().backward()
        counts.append(counter.flops if isinstance(counter, FlopCounter) else counter.get_total_flops())
    linear = 3 * 2 * tokens.numel() * (2 * (4 * 64 * 64 + 3 * 64 * 96) + 64 * 64)
    # q k^T and its product with v; backward has five such products, because it computes q k^T again
    attention = 2 * 2 * (2 + 5) * 2 * 16 * 16 * 64
    assert counts[0] == linear + attention
    known = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu in flop_registry  # not so in torch 2.11
    assert counts[1] == linear + known * attention
