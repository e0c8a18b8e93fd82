import math
from collections.abc import Iterator

import pytest
import torch
import torchmetrics.text
from torch import Tensor
from torchmetrics import Metric

from lightning_fp8.metrics import BitsPerByte, Perplexity

VOCAB = 11
TOKEN_BYTES = torch.tensor([0, *range(1, VOCAB)])  # token 0 is special


@pytest.fixture
def bf16_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def batches(count: int = 3, batch: int = 2, length: int = 7) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (count, batch, length)
    logits = 3 * torch.randn(*shape, VOCAB, generator=generator, dtype=torch.float32)
    return list(zip(logits, torch.randint(VOCAB, shape, generator=generator), strict=True))


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    """The reference, in fp64: minus the log of the softmax at each target."""
    return -logits.double().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignore_index", [None, 0, -100])
def test_perplexity_is_the_reference(dtype: torch.dtype, ignore_index: int | None) -> None:
    metric, expected = Perplexity(ignore_index), []
    for logits, targets in batches():
        if ignore_index is not None:
            targets[0, :3] = ignore_index
        metric.update(logits.to(dtype), targets)
        counted = targets != ignore_index if ignore_index is not None else torch.ones_like(targets, dtype=torch.bool)
        expected.append(nats(logits.to(dtype), targets.clamp(0))[counted])
    torch.testing.assert_close(metric.compute().double(), torch.cat(expected).mean().exp(), rtol=1e-6, atol=0)


def test_perplexity_survives_a_confident_mistake() -> None:
    logits, targets = batches()[0]
    logits[0, 0, (targets[0, 0] + 1) % VOCAB] = 200.0
    ours, theirs = Perplexity(), torchmetrics.text.Perplexity()
    for metric in (ours, theirs):
        metric.update(logits, targets)
    assert theirs.compute().isinf(), "torchmetrics has mended this: the subclass may not be needed any more"
    torch.testing.assert_close(ours.compute().double(), nats(logits, targets).mean().exp(), rtol=1e-5, atol=0)


def test_bits_per_byte_is_nats_over_ln2_over_bytes_of_text() -> None:
    metric, total, size = BitsPerByte(TOKEN_BYTES), 0.0, 0
    for logits, targets in batches():
        metric.update(logits, targets)
        text = targets != 0
        total += nats(logits, targets)[text].sum().item()
        size += int(TOKEN_BYTES[targets[text]].sum())
    assert metric.compute().item() == pytest.approx(total / math.log(2) / size, rel=1e-6)


def test_special_tokens_count_nowhere() -> None:
    logits, targets = batches()[0]
    targets[:, -1] = 0
    without, with_them = BitsPerByte(TOKEN_BYTES), BitsPerByte(TOKEN_BYTES)
    without.update(logits[:, :-1], targets[:, :-1])
    with_them.update(logits, targets)
    assert with_them.compute() == pytest.approx(without.compute().item())


def test_bits_per_byte_of_nothing_is_nan() -> None:
    metric = BitsPerByte(TOKEN_BYTES)
    metric.update(torch.zeros(1, 2, VOCAB), torch.zeros(1, 2, dtype=torch.int64))
    assert metric.compute().isnan()


def test_uniform_bytes_cost_eight_bits() -> None:
    metric = BitsPerByte(torch.ones(256, dtype=torch.int64))
    metric.update(torch.zeros(1, 5, 256), torch.arange(5)[None])
    assert metric.compute() == pytest.approx(8.0)


@pytest.mark.parametrize("make", [Perplexity, lambda: BitsPerByte(TOKEN_BYTES)], ids=["perplexity", "bits"])
class TestBoth:
    def test_batchwise_is_whole(self, make: type[Perplexity]) -> None:
        batchwise, whole = make(), make()
        for logits, targets in batches():
            batchwise.update(logits, targets)
        whole.update(*(torch.cat(parts) for parts in zip(*batches(), strict=True)))
        torch.testing.assert_close(batchwise.compute(), whole.compute(), rtol=1e-6, atol=0)

    def test_reset_forgets(self, make: type[Perplexity]) -> None:
        used, fresh = make(), make()
        used.update(*batches()[0])
        used.reset()
        for metric in (used, fresh):
            metric.update(*batches()[1])
        assert used.compute() == fresh.compute()

    @pytest.mark.usefixtures("bf16_default")
    def test_states_stay_exact_under_bf16(self, make: type[Perplexity]) -> None:
        holder = torch.nn.Module()
        holder.metric = make()
        holder.to(torch.bfloat16)
        for logits, targets in batches():  # the second time after a reset, which returns to the defaults
            assert self.dtypes(holder.metric) == {torch.float32, torch.int64}
            holder.metric.update(logits, targets)
            assert self.dtypes(holder.metric) == {torch.float32, torch.int64}
            assert holder.metric.compute().dtype == torch.float32
            holder.metric.reset()

    def dtypes(self, metric: Metric) -> set[torch.dtype]:
        return {getattr(metric, state).dtype for state in metric._defaults}

    def test_ranks_add_up(self, make: type[Perplexity]) -> None:
        assert all(reduce(torch.tensor([1.0, 2.0])) == 3 for reduce in make()._reductions.values())
