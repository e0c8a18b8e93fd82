"""Prepared token chunks as Lightning data, with a resume that is exact to the batch.

litdata streams blocks of T + 1 tokens from memory-mapped chunks, shuffles them by epoch and keeps its
position in the Trainer's checkpoint. Two things are added here, in the loader, so that they hold for any
module, for the Trainer and for Fabric: a resumed epoch is resumed once only, and a checkpoint is bound to the
content of the prepared folder (its fingerprint) instead of to its path, so that the folder can move but can
not silently change.
"""

import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from litdata import StreamingDataLoader, StreamingDataset
from litdata.streaming.item_loader import TokensLoader

from lightning_fp8.data.manifest import MANIFEST_NAME, Manifest
from lightning_fp8.data.tokenizer import load_tokenizer, token_bytes

# litdata views its read-only memory map as a tensor, and copies it in the same statement.
warnings.filterwarnings("ignore", "The given buffer is not writable", module="litdata")


class TokenDataModule(LightningDataModule):
    """Batches of token blocks from a folder written by `prepare`.

    A batch is an int64 tensor [B, T + 1]: the first T columns are the inputs and the last T the targets.

    Args:
        path: The prepared folder.
        sequence_length: T, the tokens that a model reads at once.
        batch_size: B, the blocks in a batch of one process.
        num_workers: Loader processes; 0 loads in the training process.
        seed: Seed of the shuffle of the training blocks.

    Raises:
        ValueError: The folder is not prepared, or has too few tokens for one batch.
    """

    def __init__(
        self,
        path: str = "data/quickstart",
        sequence_length: int = 256,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if sequence_length < 1 or batch_size < 1 or num_workers < 0:
            raise ValueError(
                f"sequence_length {sequence_length} and batch_size {batch_size} must be at least 1, "
                f"num_workers {num_workers} at least 0."
            )
        self.path = path
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._manifest: Manifest | None = None

    @property
    def manifest(self) -> Manifest:
        """The manifest of the prepared folder, read once.

        Raises:
            ValueError: There is none: the folder is missing or its preparation did not finish.
        """
        if self._manifest is None:
            self._manifest = Manifest.load(Path(self.path, MANIFEST_NAME))
        return self._manifest

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self.manifest.vocab_size

    def token_bytes(self) -> torch.Tensor:
        """UTF-8 bytes of each token id, an int64 tensor [vocab_size]; 0 for special tokens."""
        return token_bytes(load_tokenizer(Path(self.path, self.manifest.tokenizer)))

    def setup(self, stage: str | None = None) -> None:
        """Check that each split has enough tokens.

        Args:
            stage: Given by the Trainer, not used: the checks cost nothing.

        Raises:
            ValueError: The folder is not prepared, or has too few tokens for one batch.
        """
        block = self.sequence_length + 1
        world_size = self.trainer.world_size if self.trainer else 1
        # litdata gives every worker of every process whole batches, or nothing.
        needed = {"train": block * self.batch_size * max(1, self.num_workers) * world_size, "val": block}
        for name, tokens in needed.items():
            held = self.manifest.splits[name].tokens
            if held < tokens:
                raise ValueError(
                    f"The {name} split of {self.path} has {held} tokens, but sequence_length "
                    f"{self.sequence_length}, batch_size {self.batch_size} and num_workers {self.num_workers} "
                    f"need {tokens}: make them smaller, or prepare more text."
                )

    def train_dataloader(self) -> "ResumableLoader":
        """Shuffled batches [B, T + 1], all full."""
        loader = self._loader("train", shuffle=True)
        # From a checkpoint of a finished epoch Lightning restores no loader state, and counts that epoch as
        # processed but not yet as completed (which is `trainer.current_epoch`).
        if self.trainer:
            progress: Any = self.trainer.fit_loop.epoch_progress.current
            loader.current_epoch = progress.processed
        return loader

    def val_dataloader(self) -> "ResumableLoader":
        """Every validation block in order; the last batch can be smaller."""
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> "ResumableLoader":
        """The validation split."""
        return self._loader("val", shuffle=False)

    def predict_dataloader(self) -> "ResumableLoader":
        """The validation split."""
        return self._loader("val", shuffle=False)

    def _loader(self, split: str, *, shuffle: bool) -> "ResumableLoader":
        options: dict[str, Any] = {}
        # Newer releases shuffle within windows of 256 blocks, which are neighbours in the text. Chunks are
        # mapped into memory, so shuffling all of a chunk costs nothing and decorrelates the batches.
        if "item_shuffle_window" in inspect.signature(StreamingDataset).parameters:
            options["item_shuffle_window"] = "full"
        dataset = StreamingDataset(
            str(Path(self.path, split).resolve()),
            item_loader=TokensLoader(block_size=self.sequence_length + 1),
            shuffle=shuffle,
            # None keeps every block, except with several processes, where uneven shares would block
            # collectives.
            drop_last=True if shuffle else None,
            seed=self.seed,
            **options,
        )
        loader = ResumableLoader(
            dataset, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=_stack_blocks
        )
        loader.fingerprint = self.manifest.fingerprint
        return loader


class ResumableLoader(StreamingDataLoader):  # type: ignore[misc]  # litdata has no types
    """A streaming loader for which each `iter()` is a new epoch, but for the first one after a resume.

    litdata ends a resume only when its iterator is exhausted. Lightning stops at `len(loader)`, one call
    short of that, so the next epoch would replay the rest of the resumed one. Here a resume ends with the
    first iteration that gave a batch. An iterator that was made and not used, as Lightning does, does not
    count.

    Attributes:
        fingerprint: That of the prepared folder, kept in the state.
    """

    fingerprint = ""
    _has_resumed = False

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self._has_resumed:
            self.restore = False
        for batch in super().__iter__():
            self._has_resumed = True
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch, and the fingerprint of the data it is a position in."""
        return {**super().state_dict(), "fingerprint": self.fingerprint}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Resume from a state of a loader of the same data, wherever the folder is now.

        Args:
            obj: What `state_dict` returned.

        Raises:
            ValueError: The state belongs to other data.
        """
        if obj.get("fingerprint") != self.fingerprint:
            raise ValueError(
                f"The checkpoint was written with other data than {self.dataset.input_dir.path} now holds: "
                "prepare the folder with the same sources and parameters as then, or start a new run."
            )
        # litdata compares paths; the fingerprint has already said that the content is the same.
        dataset = {**obj["dataset"], "input_dir_path": self.dataset.input_dir.path}
        super().load_state_dict({**obj, "dataset": dataset})
        self._has_resumed = False


def _stack_blocks(blocks: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([block.to(torch.int64) for block in blocks])
