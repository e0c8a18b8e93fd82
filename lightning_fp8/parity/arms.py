"""The arms of a comparison: what each changes in a configuration of `fit`.

An overlay is what one would write into a second file after `-c`; of an optimizer of another class, the arguments that
both have stay. An arm that is not here is a file of one's own, `NAME=overlay.yaml`.

The dead-block control is the reference with no gradient in any linear layer of its blocks. That is how FP8 gradients
without scales fail, silently. Where the control ends at the reference's loss, the task does not need the blocks, or
was not trained for long enough to need them, and parity on it says nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CONTROL = "dead-blocks"


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        name: Also of its folders.
        about: In a few words.
        overlay: What it changes.
    """

    name: str
    about: str
    overlay: Mapping[str, Any]


def _optimizer(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"optimizer": {"class_path": class_path, "init_args": init_args}}


_FP8_ADAMW = "lightning_fp8.optim.FP8AdamW"
_FP32_STATES = {"gradient_release": False, **_optimizer("torch.optim.AdamW", fused=True)}
_BF16 = {
    "fp8": {"enabled": False},
    "trainer": {"precision": "bf16-mixed"},
    "model": _FP32_STATES,
}
_FP8 = {"fp8": {"enabled": True}, "trainer": {"precision": None}}


def _recipe(recipe: Any) -> dict[str, Any]:
    return {**_FP8, "fp8": {"enabled": True, "recipe": recipe}}


ARMS = {
    arm.name: arm
    for arm in (
        Arm("bf16", "BF16 GEMMs, fp32 weights, fp32 moments, torch's AdamW", _BF16),
        Arm(
            "bf16-weights",
            "BF16 GEMMs, BF16 weights rounded stochastically, fp32 moments",
            {
                "fp8": {"enabled": False},
                "trainer": {"precision": "bf16-true"},
                "model": _optimizer(_FP8_ADAMW, moments="fp32", rounding="stochastic"),
            },
        ),
        Arm("fp8", "the configuration itself, FP8 on", _FP8),
        Arm(
            "fp8-gemms",
            "FP8 GEMMs alone: fp32 weights, fp32 moments, torch's AdamW",
            {**_FP8, "fp8": {"enabled": True, "weights": "fp32"}, "model": _FP32_STATES},
        ),
        Arm("fp8-tensorwise", "the configuration, one current scale a tensor", _recipe("tensorwise")),
        Arm("fp8-delayed", "the configuration, delayed scales", _recipe("delayed")),
        Arm("fp8-rowwise", "the configuration, a scale a row", _recipe("rowwise")),
        Arm("fp8-rowwise-gw-hp", "the same, weight gradients in BF16", _recipe("rowwise_gw_hp")),
        Arm("fp8-blockwise", "the configuration, scales of 1x128 and 128x128", _recipe("blockwise")),
        Arm("mxfp8", "the configuration, a power-of-two scale for 32 numbers", _recipe("mxfp8")),
        Arm(
            "fp8-lm",
            "FP8-LM: v in fp16, fp16 master weights",
            {
                "model": _optimizer(
                    _FP8_ADAMW, betas=[0.9, 0.95], weight_decay=0.1, moments="fp8_lm", rounding="scaled_fp16"
                ),
                "fp8": {"enabled": True, "recipe": {"preset": "delayed", "history": 16}, "weights": "bf16"},
                "trainer": {"precision": None},
            },
        ),
        Arm(
            "nanotron",
            "Hugging Face's recipe: linear E4M3 moments, update clipping, its own schedule and model options",
            {
                "model": {
                    "config": {
                        "qk_norm": False,
                        "layer_scale": True,
                        "clipped_softmax": [-0.03, 1.3],
                        "smooth_swiglu": True,
                    },
                    **_optimizer(
                        _FP8_ADAMW,
                        betas=[0.9, 0.95],
                        eps=1e-7,
                        weight_decay=0.1,
                        moments="e4m3",
                        rounding="scaled_fp16",
                        clip_update_rms=1.0,
                    ),
                    "schedule": {
                        "class_path": "lightning_fp8.optim.WarmupCosine",
                        "init_args": {"warmup_steps": 50, "final_ratio": 0.4},
                    },
                },
                "fp8": {
                    "enabled": True,
                    "recipe": {"preset": "delayed", "history": 16, "margin": 0},
                    "weights": "bf16",
                    "keep_high_precision": ["*lm_head*", "*blocks.0.*", "*blocks.-1.*"],
                },
                "trainer": {"precision": None, "gradient_clip_val": None},
            },
        ),
        Arm(
            CONTROL,
            "the control: bf16 without gradients in its blocks; must come out worse",
            {
                **_BF16,
                "trainer": {
                    "precision": "bf16-mixed",
                    "callbacks+": [{"class_path": "lightning_fp8.callbacks.DeadBlocks"}],
                },
            },
        ),
    )
}
DEFAULT = ("bf16", "fp8")


def choose(names: Sequence[str]) -> list[Arm]:
    """The arms of these names; of `NAME=FILE`, one that lays this file over the configuration.

    Raises:
        ValueError: There is no such arm or file, or a name comes twice.
    """
    arms = [_own(name) if "=" in name else _known(name) for name in names]
    twice = {arm.name for arm in arms if sum(arm.name == other.name for other in arms) > 1}
    if twice:
        raise ValueError(f"--arms has {', '.join(sorted(twice))} more than once.")
    return arms


def _known(name: str) -> Arm:
    if name not in ARMS:
        raise ValueError(
            f"There is no arm {name!r}; there are {', '.join(ARMS)}, and NAME=overlay.yaml for one of your own."
        )
    return ARMS[name]


def _own(text: str) -> Arm:
    name, _, file = text.partition("=")
    if not name or not set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"):
        raise ValueError(f"The arm {text!r} needs a name of letters, digits, dots and dashes: NAME=overlay.yaml.")
    if not Path(file).is_file():
        raise ValueError(f"The arm {text!r}: there is no file {file!r}. Write NAME=overlay.yaml.")
    try:
        overlay = yaml.safe_load(Path(file).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"The arm {text!r}: {file} is not YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(overlay, dict):
        raise ValueError(f"The arm {text!r}: {file} is not a configuration, a mapping of options.")
    return Arm(name, f"the configuration and {file}", overlay)
