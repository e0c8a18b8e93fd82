"""Checkpoints that are damaged, foreign or made to do harm, and folders that cannot be written to."""

import errno
import json
import os
import pickle
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from hostile.world import CKPT, Case, cut, edit_checkpoint, edit_json, fit, flip_bit, write
from torch.distributed import checkpoint as dcp

PROMPT = ["generate", "--ckpt", CKPT, "--prompt", "a", "--tokenizer", "data/tokenizer.json"]
IMPORT = ["import", "hf", "out"]
LLAMA = {
    "model_type": "llama",
    "vocab_size": 272,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HOLD = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"


def resume(*options, path=CKPT):
    return fit("--trainer.max_steps=4", "--ckpt_path", path, *options)


def foreign(content, name="model.safetensors"):
    """Makes a model of others, with such weights."""

    def make():
        write("hf/config.json", json.dumps(LLAMA))
        write(f"hf/{name}", content)

    return make


def spoil(path, content):
    return lambda: write(path, content)


class Evil:
    """A pickle that makes a file when it is loaded as a program."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


@contextmanager
def another_run():
    """Another process has the run's folder."""
    command = [sys.executable, "-c", HOLD, "run/.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield
        process.kill()


def refused(number):
    """No folder can be made."""
    error = OSError(number, os.strerror(number), "elsewhere")
    return mock.patch.object(Path, "mkdir", side_effect=error)


CASES = [
    Case("no checkpoint", resume(path="no.ckpt"), 1, ("no.ckpt", "no such checkpoint", "--ckpt_path")),
    Case("no checkpoint to validate", ["validate", "-c", "config.yaml", "--ckpt_path=no.ckpt"], 1, ("no.ckpt", "give")),
    Case("cut", resume(), 1, (CKPT, "damaged", "--ckpt_path"), lambda: cut(CKPT)),
    Case("cut, last", resume(path="last"), 1, (CKPT, "damaged", "--ckpt_path"), lambda: cut(CKPT)),
    Case("flipped bit", resume(), 1, (CKPT, "checksum", "record", "--ckpt_path"), lambda: flip_bit(CKPT)),
    Case("empty", resume(), 1, (CKPT, "damaged", "--ckpt_path"), lambda: write(CKPT, b"")),
    Case("text", resume(), 1, (CKPT, "no checkpoint", "--ckpt_path"), lambda: write(CKPT, "hello")),
    Case("tensor", resume(), 1, (CKPT, "no training run", "--ckpt_path"), lambda: torch.save(torch.zeros(3), CKPT)),
    Case("other content", resume(), 1, (CKPT, "no training run", "--ckpt_path"), lambda: torch.save({"a": 1}, CKPT)),
    Case("program", resume(), 1, (CKPT, "posix.system", "refused"), lambda: torch.save({"a": Evil()}, CKPT)),
    Case(
        "weights alone",
        resume(),
        1,
        (CKPT, "no optimizer state", "--model.initial_weights"),
        lambda: edit_checkpoint(lambda content: content.pop("optimizer_states")),
    ),
    Case(
        "newer version",
        resume(),
        1,
        ("checkpoint", "mixture is missing here and 8 there"),
        lambda: edit_checkpoint(lambda content: content["decoder_config"].update(mixture=8)),
    ),
    Case(
        "another width", resume("--model.config.hidden_size=64"), 1, ("another model", "hidden_size is 64 here and 32")
    ),
    Case("another depth", resume("--model.config.num_layers=2"), 1, ("another model", "num_layers is 2 here and 1")),
    Case(
        "another optimizer",
        resume("--model.optimizer=torch.optim.SGD"),
        1,
        (CKPT, "SGD", "momentum", "--model.optimizer"),
    ),
    Case(
        "other data",
        resume(),
        1,
        ("position", "fingerprints was", "start a new run"),
        lambda: edit_json("data/manifest.json", fingerprint="other"),
    ),
    Case("a folder of other things", resume(path="data"), 1, ("data is no sharded checkpoint", ".metadata", "give")),
    Case(
        "program in the index of shards",
        resume(path="shards"),
        1,
        ("shards/.metadata", "posix.system", "--ckpt_path"),
        lambda: write("shards/.metadata", pickle.dumps(Evil())),
    ),
    Case(
        "program in a shard",
        resume(path="shards"),
        1,
        ("shards/__0_0.distcp", "posix.system", "refused", "--ckpt_path"),
        lambda: dcp.save({"x": Evil()}, checkpoint_id="shards", no_dist=True),
    ),
    # What is made of checkpoints.
    Case("nothing to continue", ["generate", "--ckpt=no", "--prompt=a"], 1, ("--ckpt no", "no such file")),
    Case("cut, to generate", PROMPT, 1, (CKPT, "damaged", "restore"), lambda: cut(CKPT)),
    Case("program, to generate", PROMPT, 1, (CKPT, "posix.system"), lambda: torch.save({"a": Evil()}, CKPT)),
    Case("tokenizer not there", [*PROMPT[:-1], "no.json"], 1, ("no.json", "does not exist", "give")),
    Case(
        "tokenizer of another model",
        PROMPT,
        1,
        ("token id 5000", CKPT, "272", "--tokenizer"),
        lambda: edit_json("data/tokenizer.json", model__vocab__zz=5000),
    ),
    Case("temperature", [*PROMPT, "--temperature=-1"], 1, ("temperature", "0 or more")),
    Case("empty prompt", ["generate", "--ckpt", CKPT, "--prompt", "", *PROMPT[5:]], 1, ("prompt", "at least one")),
    Case("cut, to export", ["export", CKPT, "out"], 1, (CKPT, "damaged", "restore"), lambda: cut(CKPT)),
    Case("no room in shards", ["export", CKPT, "out", "--shard_gb=0"], 1, ("shard_gb is 0", "above 0")),
    Case("over data", ["export", CKPT, "data"], 1, ("data is not empty", "give a new folder")),
    Case("nothing to import", ["import", "data", "out"], 1, ("data", "config.json", "give a folder")),
    Case(
        "import of no JSON", IMPORT, 1, ("hf/config.json", "not JSON", "restore"), lambda: write("hf/config.json", "{")
    ),
    Case("import of a list", IMPORT, 1, ("hf/config.json", "object", "restore"), lambda: write("hf/config.json", "[]")),
    Case(
        "import of words",
        IMPORT,
        1,
        ("hf/config.json", "another type", "restore"),
        lambda: write("hf/config.json", json.dumps(LLAMA | {"hidden_size": "big"})),
    ),
    *(
        Case(f"import of {name}", IMPORT, 1, ("hf/model.safetensors", "damaged", "restore"), foreign(content))
        for name, content in {"text": b"text", "a header without end": b"\xff" * 4 + b"\0" * 4 + b"{}"}.items()
    ),
    Case(
        "import without a map",
        IMPORT,
        1,
        ("model.safetensors.index.json", "weight_map", "restore"),
        foreign(b'{"weight_map": 3}', "model.safetensors.index.json"),
    ),
    Case(
        "import that leads out",
        IMPORT,
        1,
        ("model.safetensors.index.json", "../x.jsonl", "do not use"),
        foreign(b'{"weight_map": {"norm.weight": "../x.jsonl"}}', "model.safetensors.index.json"),
    ),
    Case("nothing to report", ["report", "nowhere"], 1, ("nowhere", "no run", "Give")),
    *(
        Case(
            f"report of {name}", ["report", "run"], 1, (f"run/{file}", "damaged", remedy), spoil(f"run/{file}", content)
        )
        for name, file, content, remedy in (
            ("a cut summary", "summary.json", "{", "remove it"),
            ("a summary in a list", "summary.json", "[1]", "remove it"),
            ("other events", "events.jsonl", "{\n", "remove it"),
            ("words", "metrics.csv", "step,train/loss\nx,y\n", "restore"),
            ("bytes", "metrics.csv", bytes(range(256)) * 4, "restore"),
        )
    ),
    # The run's folder.
    Case("a file in its place", fit("--trainer.default_root_dir=x.jsonl"), 1, ("x.jsonl", "a file", "another path")),
    Case(
        "below a file", fit("--trainer.default_root_dir=x.jsonl/run"), 1, ("x.jsonl/run", "is a file", "another path")
    ),
    Case("no permission", fit(), 1, ("elsewhere", "permission denied", "another path"), lambda: refused(errno.EACCES)),
    Case("read-only disk", fit(), 1, ("elsewhere", "read-only", "written to"), lambda: refused(errno.EROFS)),
    Case("full disk", fit(), 1, ("elsewhere", "no space", "make room"), lambda: refused(errno.ENOSPC)),
    Case("another run in it", fit(), 1, ("Another run writes to run", "--trainer.default_root_dir"), another_run),
]
