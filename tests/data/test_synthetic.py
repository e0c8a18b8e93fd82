import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fp8.data.synthetic import SyntheticBatches, TokenSource, markov_copy, skip_bigram, zipf

SOURCES = {"skip_bigram": skip_bigram, "zipf": zipf, "markov_copy": markov_copy}
every_source = pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)


def counted(tokens: Tensor, lag: int, size: int) -> Tensor:
    """How often each pair of tokens, `lag` apart, occurs, as probabilities of the second given the first."""
    pairs = tokens[:, :-lag] * size + tokens[:, lag:]
    counts = torch.bincount(pairs.flatten(), minlength=size * size).view(size, size).double()
    return counts / counts.sum(1, keepdim=True)


@every_source
def test_a_batch_is_a_function_of_seed_and_step(make: Callable[[], TokenSource]) -> None:
    batch = make().batch(3, 4, 33, seed=1)
    assert batch.shape == (4, 33)
    assert batch.dtype == torch.int64
    torch.manual_seed(9)
    assert torch.equal(make().batch(3, 4, 33, seed=1), batch)
    for step, seed in ((4, 1), (3, 2), (1, 3)):
        assert not torch.equal(make().batch(step, 4, 33, seed=seed), batch)
    assert not torch.equal(batch[0], batch[1])


@every_source
def test_tokens_are_as_frequent_as_said_at_every_position(make: Callable[[], TokenSource]) -> None:
    source = make()
    tokens, expected = source.batch(0, 4096, 40), source.stationary()
    assert expected.sum().item() == pytest.approx(1, abs=1e-9)
    assert torch.allclose(expected @ source.transition_vw, expected, atol=1e-9)
    for t in (0, 1, 17, 39):
        found = torch.bincount(tokens[:, t], minlength=source.vocab_size) / len(tokens)
        assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / len(tokens)).sqrt() + 1e-3).all()


def test_skip_bigrams_are_drawn_from_the_table() -> None:
    source = skip_bigram()
    tokens = source.batch(0, 512, 512)
    n = len(tokens) * 510 * source.stationary()[:, None]
    p = source.transition_vw
    assert ((counted(tokens, 2, 32) - p).abs() <= 6 * (p * (1 - p) / n).sqrt() + 2 / n).all()


def test_of_two_neighbours_a_skip_bigram_tells_nothing() -> None:
    """So blocks are needed: given the token before, the next has the frequencies of all tokens."""
    source = skip_bigram()
    tokens, p = source.batch(0, 1024, 512), source.stationary()
    n = len(tokens) * 511 * p[:, None]
    # Pairs of neighbours come from two chains, a pair of pairs of which is not independent: hence the factor of 3.
    assert ((counted(tokens, 1, 32) - p).abs() <= 6 * 3 * (p * (1 - p) / n).sqrt() + 2 / n).all()
    alone = float(torch.special.entr(p).sum())
    assert source.entropy() == pytest.approx(1.24, abs=0.01)
    assert alone == pytest.approx(3.13, abs=0.01)


@pytest.mark.parametrize("make", [skip_bigram, zipf])
def test_entropy_is_the_best_loss_on_average(make: Callable[[], TokenSource]) -> None:
    source = make()
    tokens = source.batch(0, 1024, 130)
    first = float(torch.special.entr(source.stationary()).sum())
    # The first predictions of a lag of 2 have nothing to go by.
    expected = (source.entropy() * (130 - source.lag) + first * (source.lag - 1)) / 129
    assert source.best_loss(tokens) == pytest.approx(expected, abs=0.01)  # 130,000 tokens of a deviation below 2 nats


def test_best_loss_of_copies_by_hand() -> None:
    source = TokenSource(torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=torch.float64), copy=0.5, copy_lag=2)
    tokens = torch.tensor([[0, 1, 0, 1, 1]])
    # p(1|0), then each the mean of a transition and of whether the token two before is the same
    likelihoods = [0.25, (0.5 + 1) / 2, (0.25 + 1) / 2, (0.5 + 0) / 2]
    assert source.best_loss(tokens) == pytest.approx(-sum(map(math.log, likelihoods)) / 4)


def test_copies_are_as_frequent_as_said() -> None:
    source = markov_copy()
    tokens = source.batch(0, 512, 256)
    targets, before = tokens[:, 16:], tokens[:, :-16]
    by_chance = source.transition_vw[tokens[:, 15:-1], before].mean()
    assert (targets == before).double().mean().item() == pytest.approx(0.5 + 0.5 * by_chance.item(), abs=0.01)
    assert source.best_loss(tokens) < TokenSource(source.transition_vw).entropy()


def test_no_model_beats_the_best_loss() -> None:
    """A wrong transition does worse on the same tokens, by the divergence."""
    source, other = skip_bigram(), skip_bigram(seed=1)
    tokens = source.batch(0, 64, 65)
    assert other.best_loss(tokens) > source.best_loss(tokens) + 1


def test_zipf_is_zipf() -> None:
    frequency = zipf().stationary().sort(descending=True).values
    slope = torch.log(frequency[0] / frequency[-1]) / math.log(512)
    assert 0.9 < slope < 1.6
    assert frequency[-1] < 1e-3 < 0.05 < frequency[0]


def test_copies_have_no_closed_form() -> None:
    with pytest.raises(ValueError, match="use best_loss"):
        markov_copy().entropy()


@pytest.mark.parametrize(
    ("options", "said"),
    [({"lag": 0}, "lag 0"), ({"copy": 1.0}, "copy 1.0"), ({"transition_vw": torch.ones(2, 2)}, "rows of prob")],
)
def test_mistakes_are_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TokenSource(**{"transition_vw": torch.eye(2, dtype=torch.float64), **options})  # type: ignore[arg-type]


def test_batches_for_a_loader() -> None:
    data = SyntheticBatches(skip_bigram(), steps=3, size=4, length=9, seed=5)
    batches = list(DataLoader(data, batch_size=None))
    assert len(batches) == 3
    assert torch.equal(batches[2], skip_bigram().batch(2, 4, 9, seed=5))
    with pytest.raises(IndexError):
        data[3]
