import pytest
import torch

from lightning_fp8.models.sampling import Sampling, draw, limited

SHARES = torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625], [0.0625, 0.5, 0.0625, 0.125, 0.25]])


def kept(**options: float) -> list[set[int]]:
    rows = limited(SHARES.log(), Sampling(temperature=1.0, **{"top_k": 0, **options}))
    return [set(row.isfinite().nonzero()[:, 0].tolist()) for row in rows]


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        ({}, {0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {0, 1}, {1, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.4}, {0}, {1}),
        ({"top_p": 0.6}, {0, 1}, {1, 4}),
        ({"top_p": 0.8}, {0, 1, 2}, {1, 3, 4}),
        ({"min_p": 0.2}, {0, 1, 2}, {1, 3, 4}),
        ({"min_p": 1.0}, {0}, {1}),
        ({"top_k": 2, "top_p": 0.6}, {0}, {1}),  # of the two, the first has 2/3
    ],
)
def test_limits(options: dict[str, float], first: set[int], second: set[int]) -> None:
    assert kept(**options) == [first, second]


def test_draws_follow_the_shares_that_are_left() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = SHARES[:1].log().expand(4000, -1)
    drawn = draw(logits, Sampling(temperature=0.5, top_k=3), generator)
    shares = torch.bincount(drawn, minlength=5) / 4000
    expected = SHARES[0, :3] ** 2
    torch.testing.assert_close(shares[:3], expected / expected.sum(), rtol=0, atol=0.02)
    assert shares[3:].sum() == 0
