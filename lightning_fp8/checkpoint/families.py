"""Hugging Face's `config.json` and names of weights, for the families that the decoder spans: the maps, as data.

Outward the family is found by what the configuration has: QK-norm is Qwen 3, biases on queries, keys and values alone
are Qwen 2, a sliding window in all blocks is Mistral, all else is Llama. What no family has is refused, not dropped.
"""

from collections.abc import Mapping
from typing import Any

from lightning_fp8.models.config import DecoderConfig, RopeScaling
from lightning_fp8.models.rope import ntk_theta

_PARTS = {
    "embedding": "embed_tokens",
    "blocks": "layers",
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "mlp_norm": "post_attention_layernorm",
}
_PARTS_BACK = {theirs: ours for ours, theirs in _PARTS.items()}
_HEAD = "lm_head."

# Ours -> theirs, where a value is passed as it is.
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
    "context_length": "max_position_embeddings",
}
_ROPE_FIELDS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_context": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_context": "original_max_position_embeddings",
        "beta_slow": "beta_slow",
        "beta_fast": "beta_fast",
        "attention_factor": "attention_factor",
    },
}
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# What changes the function, and none of the families has. Penalties and Smooth-SwiGLU change training alone.
_OURS_ALONE = {
    "attention_softcap": "soft-caps",
    "logit_softcap": "soft-caps",
    "clipped_softmax": "clipped softmax",
    "attention_sink": "learnt sinks",
    "layer_scale": "gains on what blocks add",
}
# What `transformers` assumes where a config.json is silent, if that differs between families.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "max_window_layers": 28},
    "qwen3": {"max_position_embeddings": 32768, "max_window_layers": 28, "head_dim": 128},
}


def weight_to_hf(name: str) -> str:
    """Their name of one of our weights: "blocks.0.attention.q_proj.weight" -> "model.layers.0.self_attn.q_proj.…"."""
    theirs = ".".join(_PARTS.get(part, part) for part in name.split("."))
    return theirs if name.startswith(_HEAD) else f"model.{theirs}"


def weight_from_hf(name: str) -> str:
    """The inverse of `weight_to_hf`."""
    return ".".join(_PARTS_BACK.get(part, part) for part in name.removeprefix("model.").split("."))


def config_to_hf(config: DecoderConfig, *, dtype: str) -> dict[str, Any]:
    """The `config.json` of a decoder.

    Args:
        config: The decoder's shape.
        dtype: Of the weights, as torch names it: "bfloat16".

    Raises:
        ValueError: None of the families has what `config` asks for.
    """
    family = _family_of(config)
    theirs: dict[str, Any] = {"architectures": [_CLASSES[family]], "model_type": family, "dtype": dtype}
    theirs |= {their: getattr(config, our) for our, their in _FIELDS.items()}
    theirs |= {"head_dim": config.head_size, "hidden_act": "silu", "attention_dropout": 0.0}
    if family in ("llama", "qwen3"):
        theirs["attention_bias"] = config.qkv_bias
    if family == "llama":
        theirs["mlp_bias"] = config.mlp_bias
    if family in ("qwen2", "qwen3"):
        theirs["use_sliding_window"] = config.sliding_window is not None
        theirs["max_window_layers"] = config.num_full_attention_layers
    if family != "llama":
        theirs["sliding_window"] = config.sliding_window
    # Both spellings of the positions: `rope_parameters` is read by transformers 5, the others by what came before.
    scaling, theta = config.rope_scaling, config.rope_theta
    if scaling and scaling.kind == "ntk":
        scaling, theta = None, ntk_theta(config)
    rope = {"rope_type": scaling.kind if scaling else "default"}
    if scaling:
        values = {their: getattr(scaling, our) for our, their in _ROPE_FIELDS[scaling.kind].items()}
        rope |= {name: value for name, value in values.items() if value is not None}
    theirs["rope_parameters"] = {"rope_theta": theta, **rope}
    return theirs | {"rope_theta": theta, "rope_scaling": rope if scaling else None}


def _family_of(config: DecoderConfig) -> str:
    for name, what in _OURS_ALONE.items():
        if getattr(config, name):
            raise ValueError(f"{name} cannot be exported: Llama, Mistral and Qwen have no {what}.")
    windowed, everywhere = config.sliding_window is not None, config.num_full_attention_layers == 0
    qkv, out, mlp = config.qkv_bias, config.o_bias, config.mlp_bias
    if config.qk_norm and qkv == out and not mlp:
        return "qwen3"
    if not config.qk_norm and qkv and not out and not mlp:
        return "qwen2"
    if not config.qk_norm and not (qkv or out or mlp) and windowed and everywhere:
        return "mistral"
    if not config.qk_norm and qkv == out and not windowed:
        return "llama"
    raise ValueError(
        f"No family of Hugging Face's has qk_norm={config.qk_norm}, qkv_bias={qkv}, o_bias={out}, mlp_bias={mlp},"
        f" sliding_window={config.sliding_window} and num_full_attention_layers={config.num_full_attention_layers}"
        " together. See lightning_fp8/checkpoint/families.py for those there are."
    )


def config_from_hf(theirs: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a `config.json`.

    Raises:
        ValueError: Another family, or something that the decoder has not.
    """
    family = theirs.get("model_type")
    if family not in _CLASSES:
        raise ValueError(f"config.json is of model_type {family!r}; known are {', '.join(_CLASSES)}.")
    theirs = {**_DEFAULTS[family], **theirs}
    if theirs.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json asks for hidden_act {theirs['hidden_act']!r}; the decoder has silu alone.")
    ours = {our: theirs[their] for our, their in _FIELDS.items() if theirs.get(their) is not None}
    ours.setdefault("num_kv_heads", theirs["num_attention_heads"])
    head_dim = theirs.get("head_dim")
    own = head_dim and head_dim * theirs["num_attention_heads"] != theirs["hidden_size"]
    bias = bool(theirs.get("attention_bias", False)) if family in ("llama", "qwen3") else False
    return DecoderConfig(
        **ours,
        **_rope_from_hf(theirs),
        **_window_from_hf(family, theirs),
        head_dim=head_dim if own else None,
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2" or bias,
        o_bias=bias,
        mlp_bias=family == "llama" and bool(theirs.get("mlp_bias", False)),
    )


def _rope_from_hf(theirs: Mapping[str, Any]) -> dict[str, Any]:
    rope = {**(theirs.get("rope_scaling") or {}), **(theirs.get("rope_parameters") or {})}
    theta = rope.get("rope_theta") or theirs.get("rope_theta") or 10000.0
    kind: Any = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("config.json rotates a part of each head (partial_rotary_factor); the decoder rotates all.")
    if kind == "default":
        return {"rope_theta": float(theta), "rope_scaling": None}
    if kind not in _ROPE_FIELDS:
        raise ValueError(f"config.json scales positions by {kind!r}; known are {', '.join(_ROPE_FIELDS)}.")
    if kind == "yarn" and (rope.get("mscale") or not rope.get("truncate", True)):
        raise ValueError("config.json uses mscale or truncate of YaRN, which the decoder has not.")
    values = {our: rope[their] for our, their in _ROPE_FIELDS[kind].items() if rope.get(their) is not None}
    if kind in ("yarn", "llama3"):
        values.setdefault("original_context", theirs["max_position_embeddings"])
    return {"rope_theta": float(theta), "rope_scaling": RopeScaling(kind=kind, **values)}


def _window_from_hf(family: str, theirs: Mapping[str, Any]) -> dict[str, Any]:
    window = theirs.get("sliding_window")
    if family == "llama" or (family != "mistral" and not theirs.get("use_sliding_window", False)):
        window = None
    if window is None:
        return {"sliding_window": None, "num_full_attention_layers": 0}
    layers = theirs["num_hidden_layers"]
    kinds = theirs.get("layer_types")
    full = kinds.count("full_attention") if kinds else theirs.get("max_window_layers", 0)
    if kinds and kinds != ["full_attention"] * full + ["sliding_attention"] * (layers - full):
        raise ValueError("config.json mixes sliding and full layers (layer_types) in another order than full first.")
    return {"sliding_window": window, "num_full_attention_layers": min(full, layers)}
