"""Weights that lie in files, read one tensor at a time: a model is never in memory twice, and need not be once.

The three layouts that are read are safetensors (one file, or shards with an index), a checkpoint file of the Trainer,
and a folder of a sharded one (`ModelParallelStrategy` writes it), which is put together tensor by tensor.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_fp8.checkpoint.families import config_from_hf, weight_from_hf, weight_to_hf
from lightning_fp8.checkpoint.integrity import check_checkpoint
from lightning_fp8.models.config import DecoderConfig, config_from_dict
from lightning_fp8.models.decoder import Decoder
from lightning_fp8.models.saved import load_weights

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SCALE = "_scale"  # what FP8 weights' scales are called: q_proj.weight, q_proj.weight_scale


class Weights(NamedTuple):
    """A decoder's weights in files.

    Attributes:
        config: Its shape.
        read: Name, as in `Decoder.state_dict`, -> tensor on the CPU.
    """

    config: DecoderConfig
    read: Callable[[str], Tensor]

    def names(self) -> list[str]:
        """Of the weights; one that is tied appears once, as the embedding."""
        return [name for name, _ in expected(self.config)]


def expected(config: DecoderConfig) -> list[tuple[str, torch.Size]]:
    """Names and shapes of a decoder's weights."""
    with torch.device("meta"):
        return [(name, p.shape) for name, p in Decoder(config).named_parameters()]


def open_ours(path: Path) -> Weights:
    """Of a checkpoint of ours, a file or a folder.

    Raises:
        ValueError: It is none, or it lacks a weight.
    """
    check_checkpoint(path)
    if path.is_dir():
        return _open_sharded(path)
    saved, tensors = load_weights(str(path))
    return _checked(config_from_dict(saved), tensors, tensors.__getitem__, path)


def _open_sharded(path: Path) -> Weights:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    prefix = "state_dict.decoder."
    known: dict[str, Any] = FileSystemReader(path).read_metadata().state_dict_metadata
    saved = torch.load(path / "meta.pt", weights_only=True)["decoder_config"]

    def read(name: str) -> Tensor:
        key = prefix + name
        tensor = torch.empty(known[key].size, dtype=known[key].properties.dtype)
        load({key: tensor}, checkpoint_id=path, no_dist=True)
        return tensor

    names = [key.removeprefix(prefix) for key in known if key.startswith(prefix)]
    return _checked(config_from_dict(saved), names, read, path)


def open_hf(path: Path) -> Weights:
    """Of a folder in Hugging Face's layout, or one safetensors file with a config.json beside it.

    FP8 weights are read as what they stand for, in bf16.

    Raises:
        ValueError: No such files, another family of models, or a weight that is missing or left over.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; give a folder as transformers' save_pretrained writes it.")
    try:
        config = config_from_hf(_read_object(folder / "config.json"))
    except (TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"{folder / 'config.json'} lacks a value or has one of another type ({error!r}): restore it from a copy."
        ) from error
    files = _files(path)
    if config.tied_embeddings:
        files.pop("lm_head.weight", None)

    def read(name: str) -> Tensor:
        theirs = weight_to_hf(name)
        tensor = _read_safetensor(files[theirs], theirs)
        if tensor.dtype.itemsize != 1:
            return tensor
        scale = _read_safetensor(files[theirs + SCALE], theirs + SCALE)
        return (tensor.float() * scale.float()).bfloat16()

    scales = {name + SCALE for name in files}
    return _checked(config, [weight_from_hf(name) for name in files if name not in scales], read, path)


def _read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        ValueError: It holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): restore it from a copy.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: restore it from a copy.")
    return content


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file of safetensors.

    Raises:
        ValueError: It is none, or cut short.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not safetensors ({error}): restore it from a copy.") from error


def _files(path: Path) -> dict[str, Path]:
    """Where each tensor is."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and (path / INDEX).is_file():
        files = _read_object(path / INDEX).get("weight_map")
        if not (isinstance(files, dict) and all(isinstance(file, str) for file in files.values())):
            raise ValueError(f"{path / INDEX} has no weight_map from tensors to files: restore it from a copy.")
        for name, file in files.items():
            if Path(file).name != file:
                raise ValueError(f"{path / INDEX}: {name} is in {file}, outside of its folder: do not use this model.")
        return {name: folder / file for name, file in files.items()}
    single = path / SINGLE if path.is_dir() else path
    if not single.is_file():
        raise ValueError(f"{path} has neither {SINGLE} nor {INDEX}; weights in other formats are not read.")
    with _opened(single) as file:
        return dict.fromkeys(file.keys(), single)


def _read_safetensor(path: Path, name: str) -> Tensor:
    with _opened(path) as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _checked(config: DecoderConfig, found: Iterable[str], read: Callable[[str], Tensor], path: Path) -> Weights:
    shapes = dict(expected(config))
    names = set(found) - ({"lm_head.weight"} if config.tied_embeddings else set())
    if names != set(shapes):
        missing, extra = sorted(set(shapes) - names), sorted(names - set(shapes))
        raise ValueError(f"{path} does not fit its configuration: missing {missing[:3]}, left over {extra[:3]}.")

    def read_checked(name: str) -> Tensor:
        tensor = read(name)
        if tensor.shape != shapes[name]:
            raise ValueError(f"{path}: {name} is {list(tensor.shape)}, its configuration says {list(shapes[name])}.")
        return tensor

    return Weights(config, read_checked)


def write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> int:
    """Writes safetensors files of at most `shard_bytes` (or one tensor) each, holding one shard at a time.

    Returns:
        The bytes of all tensors.
    """
    from safetensors.torch import save_file

    files: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    held = total = 0

    def flush() -> None:
        nonlocal held
        save_file(shard, folder / f"shard-{len(files)}", metadata={"format": "pt"})
        files.append(list(shard))
        shard.clear()
        held = 0

    for name, tensor in tensors:
        if shard and held + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor.contiguous()
        held, total = held + tensor.nbytes, total + tensor.nbytes
        del tensor
    flush()
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    names = names if len(files) > 1 else [SINGLE]
    for i, name in enumerate(names):
        (folder / f"shard-{i}").replace(folder / name)
    if len(files) > 1:
        weight_map = {tensor: name for name, tensors_of in zip(names, files, strict=True) for tensor in tensors_of}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    return total
