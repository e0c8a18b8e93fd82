"""Import and export: a decoder's checkpoint from and to the folder that `transformers` and inference servers read.

A round trip is exact to the bit: weights keep their dtype and values. The tokenizer's files go along, as they are.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Literal, cast

import torch
import yaml
from torch import Tensor

from lightning_fp8.checkpoint.families import config_to_hf, weight_to_hf
from lightning_fp8.checkpoint.weights import SCALE, Weights, open_hf, open_ours, write_shards
from lightning_fp8.data.tokenizer import ENDS_OF_TEXT
from lightning_fp8.files import write_whole
from lightning_fp8.numerics.formats import E4M3
from lightning_fp8.numerics.quantize import quantize

Dtype = Literal["saved", "bf16", "fp16", "fp32"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ALONG = (  # what goes along with the weights, if it is there
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
# compressed-tensors' words for FP8 weights with a scale a row, and inputs cast a token at a time as they come.
_FP8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
}


def import_checkpoint(source: str, output: str) -> None:
    """Turns a model in Hugging Face's layout into a checkpoint of ours.

    Writes `checkpoints/last.ckpt`, the tokenizer's files and `model.yaml`, an overlay with the model's shape that
    begins a training with its weights: `lightning-fp8 fit -c CONFIG -c OUTPUT/model.yaml`.

    Args:
        source: A folder with config.json and safetensors, or one safetensors file with config.json beside it.
        output: The folder to write.

    Raises:
        ValueError: The model is none that the decoder can be.
    """
    weights, folder = open_hf(Path(source)), Path(output)
    state = {f"decoder.{name}": weights.read(name) for name in weights.names()}
    if weights.config.tied_embeddings:
        state["decoder.lm_head.weight"] = state["decoder.embedding.weight"]
    path = folder / "checkpoints" / "last.ckpt"
    checkpoint = {"decoder_config": asdict(weights.config), "state_dict": state, **_lightning_fields()}
    write_whole(path, lambda file: torch.save(checkpoint, cast(IO[bytes], file)))
    _copy_along(Path(source) if Path(source).is_dir() else Path(source).parent, folder)
    overlay = {"model": {"config": asdict(weights.config), "initial_weights": str(path)}}
    (folder / "model.yaml").write_text(yaml.safe_dump(overlay, sort_keys=False))
    print(f"{path}: {sum(t.numel() for t in state.values()):,} weights; train on with -c {folder}/model.yaml")


def _lightning_fields() -> dict[str, Any]:
    """What the Trainer asks of a checkpoint of which it loads the weights alone."""
    import lightning

    return {"pytorch-lightning_version": lightning.__version__, "epoch": 0, "global_step": 0}


def export_checkpoint(ckpt: str, output: str, dtype: Dtype = "saved", fp8: bool = False, shard_gb: float = 5.0) -> None:
    """Writes a checkpoint in Hugging Face's layout: safetensors, config.json and the tokenizer's files.

    Args:
        ckpt: A checkpoint that `fit` or `import` wrote, or the folder of a sharded one.
        output: The folder to write; a new one, or an empty one.
        dtype: Of the weights.
        fp8: Write the linear layers' weights in E4M3 with a scale a row, as compressed-tensors and the inference
            servers that know it read them; inputs are then cast a token at a time. The head stays as it is.
        shard_gb: Most gigabytes a file.

    Raises:
        ValueError: The checkpoint is none, no family of models has its shape, or the folder is not empty.
    """
    folder = Path(output)
    if not shard_gb > 0:
        raise ValueError(f"shard_gb is {shard_gb}; it must be above 0.")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give a new folder.")
    if not Path(ckpt).exists():
        raise ValueError(f"{ckpt}: there is no such checkpoint.")
    weights = open_ours(Path(ckpt))
    saved = weights.read("norm.weight").dtype
    theirs = config_to_hf(weights.config, dtype=str(_DTYPES.get(dtype, saved)).removeprefix("torch."))
    folder.mkdir(parents=True, exist_ok=True)
    _copy_along(Path(ckpt).parent.parent, folder)
    theirs |= _special_tokens(folder) | ({"quantization_config": _FP8} if fp8 else {})
    total = write_shards(_tensors(weights, _DTYPES.get(dtype), fp8=fp8), folder, int(shard_gb * 1e9))
    (folder / "config.json").write_text(json.dumps(theirs, indent=2))
    print(f"{folder}: {theirs['architectures'][0]}, {total / 1e9:.3f} GB")


def _tensors(weights: Weights, dtype: torch.dtype | None, *, fp8: bool) -> Iterator[tuple[str, Tensor]]:
    for name in weights.names():
        theirs, tensor = weight_to_hf(name), weights.read(name)
        if fp8 and name.endswith("_proj.weight"):
            codes, scale, _ = quantize(tensor, E4M3, tile=(1, None))
            yield theirs, codes
            yield theirs + SCALE, scale
        else:
            yield theirs, tensor if dtype is None else tensor.to(dtype)


def _copy_along(source: Path, target: Path) -> None:
    for name in _ALONG:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (target / "tokenizer.json").is_file() and not (target / "tokenizer_config.json").is_file():
        end = _end_of_text(target / "tokenizer.json")
        tokens = {"eos_token": end[0], "bos_token": end[0]} if end else {}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}
        (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _special_tokens(folder: Path) -> dict[str, Any]:
    """The ids that begin and end a text, for config.json."""
    if (folder / "generation_config.json").is_file():
        known = json.loads((folder / "generation_config.json").read_text())
        return {name: known[name] for name in ("bos_token_id", "eos_token_id") if name in known}
    end = _end_of_text(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else None
    return {"bos_token_id": end[1], "eos_token_id": end[1]} if end else {"bos_token_id": None, "eos_token_id": None}


def _end_of_text(tokenizer: Path) -> tuple[str, int] | None:
    """The text and the id of the token that ends a document."""
    added = json.loads(tokenizer.read_text()).get("added_tokens", [])
    ids = {token["content"]: token["id"] for token in added if token.get("special")}
    return next(((name, ids[name]) for name in ENDS_OF_TEXT if name in ids), None)
