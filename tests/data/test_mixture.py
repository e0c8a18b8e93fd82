"""Several sets in one stream, by weight, and validated one by one."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from streams import BATCH, data_of, every_steps, fit

from lightning_fp8.data import TokenDataModule, load_tokenizer, prepare


def mixed(prepared: Path, second: Path, **options: object) -> TokenDataModule:
    return data_of({str(prepared): 3, str(second): 1}, **options)


def is_of_second(blocks: torch.Tensor, prepared: Path) -> list[bool]:
    bpe = load_tokenizer(prepared / "tokenizer.json")
    return [bool(set("xyz") & set(bpe.decode(block.tolist()))) for block in blocks]


def test_sets_are_mixed_by_weight(prepared: Path, second: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_fp8.data.order.CYCLE", 64)
    data = mixed(prepared, second)
    loader = data.train_dataloader()
    assert data.set_names == ["data", "other"]
    assert len(loader) == len(training_blocks(data)) // BATCH
    blocks = torch.cat([batch for _ in range(20) for batch in loader])
    taken = is_of_second(blocks, prepared)
    share = sum(taken) / len(taken)
    assert share == pytest.approx(1 / 4, abs=4 * (3 / 16 / len(taken)) ** 0.5)
    # Each set goes through whole passes: every block as often as every other, but for the pass under way.
    for which, blocks_of in enumerate(data._blocks("train")):
        counts = Counter(tuple(block.tolist()) for block, of in zip(blocks, taken, strict=True) if of == which)
        assert len(counts) == len(blocks_of)
        assert max(counts.values()) - min(counts.values()) <= 1


def training_blocks(data: TokenDataModule) -> range:
    return range(sum(len(blocks) for blocks in data._blocks("train")))


@pytest.mark.parametrize("after", [0, 2])
def test_a_mixture_resumes_exactly(after: int, prepared: Path, second: Path, tmp_path: Path) -> None:
    whole = fit(mixed(prepared, second, num_workers=2), [every_steps(tmp_path, 13)])
    for step in (13, 39):
        rest = fit(mixed(prepared, second, num_workers=after), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert rest == whole[step:]
    with pytest.raises(ValueError, match="weights was"):
        fit(data_of({str(prepared): 1, str(second): 1}), ckpt_path=tmp_path / "step=13.ckpt")
    with pytest.raises(ValueError, match="fingerprints was"):
        fit(data_of({str(second): 3, str(prepared): 1}), ckpt_path=tmp_path / "step=13.ckpt")


def test_mixture_errors(prepared: Path, second: Path, tmp_path: Path) -> None:
    for weights in ({}, {"a": 0}, {"a": -1.0}, {"a": float("nan")}):
        with pytest.raises(ValueError, match="positive weight"):
            data_of(weights)
    with pytest.raises(ValueError, match="differ in the last part"):
        data_of({"a/x": 1, "b/x": 1})
    prepare([str(second.parent / "y.jsonl")], str(tmp_path / "mine"), vocab_size=280)
    with pytest.raises(ValueError, match="different tokenizers"):
        data_of({str(prepared): 1, str(tmp_path / "mine"): 1}).setup("fit")


def test_each_set_is_validated_by_itself(prepared: Path, second: Path) -> None:
    data = mixed(prepared, second)
    for loader, path in zip(data.val_dataloader(), (prepared, second), strict=True):
        alone = data_of(path).val_dataloader()
        assert torch.equal(torch.cat(list(loader)), torch.cat(list(alone)))
