"""Prepared sets of tokens as Lightning data: mixed by weight, resumed to the batch, from disk or from a URL.

A batch is a function of the position in the stream of blocks (see `order`), and the position is kept in the
checkpoint twice: in the state of this module, which is restored from any checkpoint, and in the loader's, by which
the Trainer resumes within an epoch and Fabric resumes at all. Checkpoints are bound to the content of the prepared
sets instead of to their paths, so that these can move but not silently change.
"""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lightning_fp8.data.folder import TokenBlocks, TokenFolder
from lightning_fp8.data.loader import TokenBatches, TokenLoader
from lightning_fp8.data.manifest import Manifest
from lightning_fp8.data.order import InOrder, Mixture, ShuffledBlocks
from lightning_fp8.data.sources import TRAIN, VAL
from lightning_fp8.data.tokenizer import load_tokenizer, token_bytes


class TokenDataModule(LightningDataModule):
    """Batches of token blocks from folders written by `prepare`.

    A batch is an int64 tensor [B, T + 1]: the first T columns are the inputs and the last T the targets.

    Args:
        path: The prepared folder or its URL (`s3://`, `gs://`, `azure://`, `r2://`, `hf://`); or several, each with
            the weight of its tokens in training, `{data/code: 0.3, data/web: 0.7}`. Sets that are mixed must have the
            same tokenizer. An epoch is as many blocks as all sets together have; small sets are repeated.
        sequence_length: T, the tokens that a model reads at once.
        batch_size: B, the blocks in a batch of one process.
        num_workers: Loader processes; 0 loads in the training process. The batches do not depend on it.
        seed: Seed of the order of the training blocks.
        length_schedule: Shorter sequences at first: from which optimizer step on which length, such as
            `{0: 64, 1000: 128}`. Lengths divide `sequence_length`; a block is cut into as many sequences as it
            holds, so a step has the same tokens whatever their length. For the Trainer; `cut_blocks` does it elsewhere.
        max_cache_size: Most that a node keeps of each set behind a URL, such as "20GB"; by default all of it.

    Raises:
        ValueError: A folder is not prepared, the sets do not go together, or there are too few tokens for one batch.
    """

    def __init__(
        self,
        path: str | dict[str, float] = "data/quickstart",
        sequence_length: int = 256,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        length_schedule: dict[int, int] | None = None,
        max_cache_size: str | int | None = None,
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
        self.max_cache_size = max_cache_size
        self.length_schedule = _check_schedule(length_schedule or {}, sequence_length)
        self.weights = _check_weights({path: 1.0} if isinstance(path, str) else path)
        self._folders: list[TokenFolder] | None = None
        self._loader: TokenLoader | None = None
        self._position = 0

    @property
    def folders(self) -> list[TokenFolder]:
        """The prepared sets, opened once.

        Raises:
            ValueError: One is missing or its preparation did not finish, or they have several tokenizers.
        """
        if self._folders is None:
            folders = [TokenFolder(path, self.max_cache_size) for path in self.weights]
            first = folders[0]
            for folder in folders[1:]:
                if _vocabulary(folder) != _vocabulary(first):
                    raise ValueError(
                        f"{folder.path} and {first.path} have different tokenizers: prepare one with the other's, "
                        "--tokenizer."
                    )
            self._folders = folders
        return self._folders

    @property
    def manifest(self) -> Manifest:
        """The manifest of the first prepared set."""
        return self.folders[0].manifest

    @property
    def set_names(self) -> list[str]:
        """A short name for each set, the last part of its path: validation loaders come in this order."""
        return [PurePosixPath(path).name for path in self.weights]

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self.manifest.vocab_size

    @property
    def gzip_bits_per_byte(self) -> float:
        """What `gzip -9` needs for the validation texts of all sets."""
        splits = [folder.manifest.splits[VAL] for folder in self.folders]
        return sum((split.gzip_bits_per_byte or 0.0) * split.bytes for split in splits) / sum(s.bytes for s in splits)

    @property
    def tokenizer_path(self) -> str:
        """Where the tokenizer's file is, on disk."""
        return str(self.folders[0].file(self.manifest.tokenizer))

    def token_bytes(self) -> torch.Tensor:
        """UTF-8 bytes of each token id, an int64 tensor [vocab_size]; 0 for special tokens.

        Raises:
            ValueError: The tokenizer is not that of the data.
        """
        lengths = token_bytes(load_tokenizer(self.tokenizer_path))
        if len(lengths) > self.vocab_size:
            raise ValueError(
                f"{self.tokenizer_path} has token id {len(lengths) - 1} and the data {self.vocab_size} tokens: it is"
                " another tokenizer than the text was prepared with; copy the folder again."
            )
        return lengths

    def setup(self, stage: str | None = None) -> None:
        """Check that each split has enough tokens.

        Args:
            stage: Given by the Trainer, not used: the checks cost nothing.

        Raises:
            ValueError: A folder is not prepared, or there are too few tokens for one batch.
        """
        block = self.sequence_length + 1
        needed = {TRAIN: block * self.batch_size * self._world[1], VAL: block * self._world[1]}
        for name, tokens in needed.items():
            # An epoch is all training sets; each validation set is a loader of its own.
            held = [folder.manifest.splits[name].tokens for folder in self.folders]
            smallest = sum(held) if name == TRAIN else min(held)
            if smallest < tokens:
                raise ValueError(
                    f"The {name} split of {', '.join(self.weights)} has {smallest} tokens, but sequence_length "
                    f"{self.sequence_length}, batch_size {self.batch_size} and {self._world[1]} processes need "
                    f"{tokens}: make them smaller, or prepare more text."
                )

    def train_dataloader(self) -> TokenLoader:
        """Shuffled and mixed batches [B, T + 1], all full."""
        sets = self._blocks(TRAIN)
        empty = [name for name, blocks in zip(self.weights, sets, strict=True) if not len(blocks)]
        if empty:
            raise ValueError(f"{empty[0]} has no block of {self.sequence_length + 1} tokens: leave it out.")
        orders = [ShuffledBlocks(blocks.chunk_sizes, self.seed + i) for i, blocks in enumerate(sets)]
        order = Mixture(orders, list(self.weights.values()), self.seed)
        rank, world_size = self._world
        batches = TokenBatches(sets, order, self.batch_size, rank, world_size, drop_last=True)
        identity = {
            "fingerprints": [folder.manifest.fingerprint for folder in self.folders],
            "weights": order.shares.tolist(),
            "seed": self.seed,
            "sequence_length": self.sequence_length,
        }
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        self._loader = TokenLoader(batches, self.num_workers, identity, accumulate)
        if self._position:
            self._loader.load_state_dict({**identity, "position": self._position, "epoch_done": 0})
        return self._loader

    def val_dataloader(self) -> Any:
        """Every validation block in order, a loader for each set; the last batch can be smaller."""
        rank, world_size = self._world
        loaders = [
            DataLoader(
                TokenBatches([blocks], InOrder(blocks.chunk_sizes), self.batch_size, rank, world_size, drop_last=False),
                batch_size=None,
                num_workers=self.num_workers,
            )
            for blocks in self._blocks(VAL)
        ]
        return loaders[0] if len(loaders) == 1 else loaders

    def test_dataloader(self) -> Any:
        """The validation split."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Any:
        """The validation split."""
        return self.val_dataloader()

    def on_before_batch_transfer(self, batch: torch.Tensor, dataloader_idx: int) -> torch.Tensor:
        """Cuts training batches to the length that the schedule has for this optimizer step."""
        if not self.length_schedule or not self.trainer or not self.trainer.training:
            return batch
        reached = [start for start in self.length_schedule if start <= self.trainer.global_step]
        return cut_blocks(batch, self.length_schedule[max(reached)]) if reached else batch

    def state_dict(self) -> dict[str, Any]:
        """The loader's position, which the Trainer itself keeps within epochs only."""
        return self._loader.state_dict() if self._loader else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the position, to start the loader there; the loader checks what it is a position in."""
        if state_dict:
            self.train_dataloader().load_state_dict(state_dict)
            self._position = state_dict["position"]

    def recount(self, checkpoint: dict[str, Any]) -> None:
        """Puts the Trainer's progress in an epoch, which a checkpoint has in batches, into batches of this run.

        They are of another size where the processes are more or fewer, or batches are accumulated. The first step
        after the resume would be of fewer batches than the others, and the epoch end elsewhere.

        Args:
            checkpoint: All of it, as the Trainer is about to restore it; changed in place.
        """
        own = checkpoint.get(type(self).__qualname__)
        progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
        if not own or not progress:
            return
        # Saved at the end of a batch, whose completion is not counted yet: the counts differ by one.
        more = own["epoch_done"] // (self.batch_size * self._world[1]) - progress["current"]["ready"]
        progress["current"] = {name: count + more for name, count in progress["current"].items()}

    @property
    def _world(self) -> tuple[int, int]:
        """Rank and number of processes."""
        if self.trainer:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():  # Fabric
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def _blocks(self, split: str) -> list[TokenBlocks]:
        return [TokenBlocks(folder, split, self.sequence_length + 1) for folder in self.folders]


def cut_blocks(blocks: torch.Tensor, length: int) -> torch.Tensor:
    """Cut blocks into shorter sequences of the same tokens.

    Args:
        blocks: [B, T + 1].
        length: l, a divisor of T.

    Returns:
        [B * T / l, l + 1]; the last token of each sequence, a target only, is the first of the next, an input only.
    """
    return blocks.unfold(1, length + 1, length).flatten(0, 1)


def _check_schedule(schedule: Mapping[int, int], sequence_length: int) -> dict[int, int]:
    for step, length in schedule.items():
        if step < 0 or length < 1 or sequence_length % length:
            raise ValueError(
                f"length_schedule has length {length} from step {step} on: steps start at 0, and lengths divide "
                f"sequence_length, {sequence_length}."
            )
    return dict(schedule)


def _check_weights(weights: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(weights, Mapping):  # the command line lets null through
        raise ValueError(f"data.path is {weights}: give the folder that `lightning-fp8 prepare` wrote.")
    wrong = [path for path, weight in weights.items() if not 0 < weight < float("inf")]
    if wrong or not weights:
        raise ValueError(f"path {dict(weights)} must name at least one folder, each with a positive weight.")
    names = [PurePosixPath(path).name for path in weights]
    if len(set(names)) < len(names):
        raise ValueError(f"The sets {', '.join(weights)} must differ in the last part of their path, their name.")
    return dict(weights)


def _vocabulary(folder: TokenFolder) -> str:
    return load_tokenizer(folder.file(folder.manifest.tokenizer)).to_str()
