"""Text in, batches of token blocks out: prepared once by `prepare`, read by `TokenDataModule`."""

import os

# litdata can ask PyPI for a newer release whenever a dataset is opened; reading local tokens needs no network.
# Set before litdata is first imported, which the imports below do.
os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")

from lightning_fp8.data.datamodule import TokenDataModule, cut_blocks
from lightning_fp8.data.manifest import Manifest, SplitInfo
from lightning_fp8.data.prepare import prepare
from lightning_fp8.data.tokenizer import END_OF_TEXT, load_tokenizer, token_bytes, train_tokenizer

__all__ = [
    "END_OF_TEXT",
    "Manifest",
    "SplitInfo",
    "TokenDataModule",
    "cut_blocks",
    "load_tokenizer",
    "prepare",
    "token_bytes",
    "train_tokenizer",
]
