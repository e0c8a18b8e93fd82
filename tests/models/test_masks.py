import pytest
import torch

from lightning_fp8.models.masks import causal_mask, documents

CPU = torch.device("cpu")


@pytest.mark.parametrize(("length", "window"), [(5, None), (5, 5), (5, 9)])
def test_what_is_plainly_causal_is_no_mask(length: int, window: int | None) -> None:
    assert causal_mask(length, window, None, CPU) is None


@pytest.mark.parametrize("window", [None, 1, 3, 9])
@pytest.mark.parametrize("packed", [False, True])
def test_every_pair_of_positions(window: int | None, packed: bool) -> None:
    numbers = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    mask = causal_mask(6, window, numbers if packed else None, CPU)
    if mask is None:
        assert not packed
        return
    for b, t, u in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(6)).tolist():
        expected = u <= t and (window is None or t - u < window)
        if packed:
            assert mask[b, 0, t, u] == (expected and numbers[b, t] == numbers[b, u])
        else:
            assert mask[t, u] == expected


def test_the_end_of_a_document_belongs_to_it() -> None:
    tokens = torch.tensor([[5, 6, 0, 7, 0, 0, 8], [0, 5, 5, 5, 5, 5, 5]])
    assert documents(tokens, end_of_text=0).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
