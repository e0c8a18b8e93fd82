"""What a prepared folder holds, in one JSON file written last.

The manifest's presence is the proof that the preparation finished, so there is no state in which a
half-written folder reads as a good one. It also carries the fingerprint of the inputs, by which a second
preparation knows that it has nothing to do and a resumed run knows that it still trains on the same tokens.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_fp8.files import write_text

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
TOKEN_DTYPES = ("uint16", "int32")  # what litdata can stream


@dataclass(frozen=True)
class SplitInfo:
    """The size of one split.

    Attributes:
        files: Source files which gave the split at least one document.
        documents: Documents, none of them empty.
        bytes: UTF-8 bytes of their text.
        tokens: Tokens stored, with one end-of-text token for every document.
        gzip_bits_per_byte: 8 × gzip (level 9) output over `bytes`, of the validation text as one stream: the
            figure that a model's bits per byte is compared with. None for the training split.
    """

    files: int
    documents: int
    bytes: int
    tokens: int
    gzip_bits_per_byte: float | None = None


@dataclass(frozen=True)
class Manifest:
    """The description of a prepared folder.

    Attributes:
        version: Version of this layout, `MANIFEST_VERSION` when written by this release.
        sources: The sources as they were given.
        fingerprint: Hash of the sources' content, the parameters and the given tokenizer.
        seed: Seed of the split.
        val_fraction: Share of the files (or documents) asked for validation, in (0, 1).
        vocab_size: One more than the largest token id.
        token_dtype: Stored type of a token id, "uint16" or "int32".
        skipped_files: Files left out because they are not UTF-8 text.
        splits: "train" and "val".
        tokenizer: File name of the tokenizer inside the folder.
    """

    version: int
    sources: list[str]
    fingerprint: str
    seed: int
    val_fraction: float
    vocab_size: int
    token_dtype: str
    skipped_files: int
    splits: dict[str, SplitInfo]
    tokenizer: str = "tokenizer.json"

    def save(self, path: str | Path) -> None:
        """Write the manifest as JSON, whole or not at all.

        Args:
            path: The file to write.
        """
        write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Manifest":
        """Read a manifest.

        Args:
            path: The file to read.

        Returns:
            The manifest.

        Raises:
            ValueError: The file is missing, malformed, or of a newer version.
        """
        try:
            fields: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            version = fields["version"]
            if version == MANIFEST_VERSION:
                splits = {name: SplitInfo(**split) for name, split in fields.pop("splits").items()}
                manifest = cls(**fields, splits={"train": splits["train"], "val": splits["val"]})
                _check(manifest)
                return manifest
        except FileNotFoundError:
            raise ValueError(f"{path} is missing: prepare the folder with `lightning-fp8 prepare`.") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            said = getattr(error, "strerror", None) or error
            raise ValueError(f"{path} is not a manifest ({said}): delete the folder and prepare it again.") from error
        raise ValueError(
            f"{path} has version {version}, this release reads version {MANIFEST_VERSION}: "
            "upgrade lightning-fp8, or prepare the folder again."
        )


def _check(manifest: Manifest) -> None:
    """Holds what a file may say against what is used of it."""
    if manifest.token_dtype not in TOKEN_DTYPES:
        raise ValueError(f"token_dtype {manifest.token_dtype!r} is not one of {', '.join(TOKEN_DTYPES)}")
    name = manifest.tokenizer
    if not isinstance(name, str) or Path(name).name != name or "\\" in name or "\0" in name:
        raise ValueError(f"tokenizer {name!r} is not a file of its folder")
    if not isinstance(manifest.fingerprint, str) or not manifest.fingerprint.replace("-", "").isalnum():
        raise ValueError(f"fingerprint {manifest.fingerprint!r} is not a hash")
    counts = {"vocab_size": manifest.vocab_size}
    for split, info in manifest.splits.items():
        counts |= {f"splits.{split}.tokens": info.tokens, f"splits.{split}.bytes": info.bytes}
    for name, count in counts.items():
        if type(count) is not int or count < 0:
            raise ValueError(f"{name} {count!r} is not a number of things")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file so that a reader, or a kill, sees the old one or the new one.

    Args:
        path: The file.
        content: What goes into it.
    """
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
