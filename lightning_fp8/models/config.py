"""The shape of a decoder, as data.

The fields span the dense families of Llama 2 and 3, Qwen 2.5 and 3 and Mistral: each of these is a choice of values
(`configs/model/` has them), and no code asks which family it is.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

# The fields on which the names and shapes of the weights depend; the others change what is computed from them.
SHAPING = (
    *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size", "head_dim"),
    *("qk_norm", "tied_embeddings", "qkv_bias", "o_bias", "mlp_bias", "layer_scale", "attention_sink"),
)

RopeKind = Literal["linear", "ntk", "yarn", "llama3"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies change for texts longer than a model was first trained on; formulas are in `rope.py`.

    Attributes:
        kind: "linear" divides all frequencies by `factor` (position interpolation); "ntk" raises the base, so that
            the highest frequency stays and the lowest is divided; "yarn" and "llama3" divide frequencies that turn
            few times in `original_context` and keep those that turn often.
        factor: New context over old.
        original_context: Positions of the first training; for "yarn" and "llama3".
        low_freq_factor: Turns in `original_context` below which "llama3" divides.
        high_freq_factor: Turns above which "llama3" keeps.
        beta_slow: Turns below which "yarn" divides.
        beta_fast: Turns above which "yarn" keeps.
        attention_factor: What "yarn" multiplies queries and keys with; None is 0.1 ln(factor) + 1.
    """

    kind: RopeKind
    factor: float
    original_context: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "ntk", "yarn", "llama3"):
            raise ValueError(f"RopeScaling.kind {self.kind!r} is not one of linear, ntk, yarn, llama3.")
        if self.factor < 1:
            raise ValueError(f"RopeScaling.factor is {self.factor}; it must be at least 1.")
        if self.kind in ("yarn", "llama3") and not self.original_context:
            raise ValueError(f"RopeScaling: {self.kind} needs original_context, the positions first trained on.")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not 0 < getattr(self, low) < getattr(self, high):
                raise ValueError(
                    f"RopeScaling: {low} {getattr(self, low)} and {high} {getattr(self, high)} must rise from above 0."
                )


MOST_LAYERS = 10_000


@dataclass(frozen=True)
class DecoderConfig:
    """A Llama-family decoder.

    Attributes:
        vocab_size: Tokens in the vocabulary.
        hidden_size: Width of the residual stream.
        num_layers: Blocks.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; fewer than `num_heads` is grouped-query attention.
        intermediate_size: Width inside the SwiGLU MLP.
        rope_theta: Base of the rotary position frequencies.
        norm_eps: Added to the mean square in RMSNorm.
        qk_norm: RMS-normalise queries and keys a head; widens the range of stable learning rates (Dehghani et al.,
            ViT-22B; Wortsman et al., 2309.14322).
        tied_embeddings: The head shares the embedding's weight.
        init_std: Standard deviation of the initial weights; that of the two projections into the residual stream is
            divided by sqrt(2 * num_layers).
        head_dim: Width of one head; None is `hidden_size` / `num_heads`.
        qkv_bias: Query, key and value projections have biases.
        o_bias: The attention's output projection has one.
        mlp_bias: The MLP's projections have biases.
        rope_scaling: For texts longer than the first training's; None is none.
        sliding_window: Each position sees itself and the `sliding_window` - 1 before it; None is all before it.
        num_full_attention_layers: So many first blocks see everything, whatever `sliding_window` is.
        attention_softcap: Attention scores s become c tanh(s / c); None is none (Gemma 2). See `scores.py` for what
            this costs, `clipped_softmax` too.
        logit_softcap: The same of the logits.
        clipped_softmax: (gamma, zeta): attention probabilities p become clip((zeta - gamma) p + gamma, 0, 1); None is
            none (Bondarenko et al., 2306.12929, who take -0.03 and 1).
        attention_sink: A learnt logit a head in the softmax's denominator, 0 at the start, when this is the
            softmax-off-by-one: a head can attend to nothing (gpt-oss).
        layer_scale: A learnt gain a channel on what attention and MLP add to the residual stream, 0 at the start
            (Touvron et al., CaiT; from zero in Wortsman et al., 2304.13013).
        smooth_swiglu: Powers of two move between the down projection's input and its weight, so that in FP8 no
            channel of either flushes the others to zero; the same function (Fishman et al., 2409.12517). See
            `smooth.py`.
        z_loss: Weight of mean(logsumexp(logits)^2) in what is minimised: keeps logits from drifting (PaLM: 1e-4).
        activation_l2: Weight of the mean square of the residual stream after each block, averaged over the blocks, in
            what is minimised (Jamba-1.5: 1e-5). Like `z_loss`, it adds to gradients and not to the loss that is
            returned, so that losses with and without it can be compared.
        context_length: Positions that the model is meant for. A record, exported as `max_position_embeddings`;
            nothing here is bound by it.
    """

    vocab_size: int = 2048
    hidden_size: int = 128
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 4
    intermediate_size: int = 384
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    qk_norm: bool = True
    tied_embeddings: bool = False
    init_std: float = 0.02
    head_dim: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    num_full_attention_layers: int = 0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    clipped_softmax: tuple[float, float] | None = None
    attention_sink: bool = False
    layer_scale: bool = False
    smooth_swiglu: bool = False
    z_loss: float = 0.0
    activation_l2: float = 0.0
    context_length: int = 2048

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "intermediate_size",
            "head_dim",
            "sliding_window",
            "context_length",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"DecoderConfig.{name} is {value}; it must be at least 1.")
        if self.num_layers > MOST_LAYERS:  # each is an object, made before any memory is asked for
            raise ValueError(f"DecoderConfig.num_layers is {self.num_layers}; it must be at most {MOST_LAYERS}.")
        for name in ("attention_softcap", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"DecoderConfig.{name} is {value}; it must be above 0, or null for none.")
        for name in ("z_loss", "activation_l2"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"DecoderConfig.{name} is {getattr(self, name)}; it must be 0, for none, or more.")
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"DecoderConfig.{name} is {getattr(self, name)}; it must be above 0.")
        if self.clipped_softmax is not None and not (self.clipped_softmax[0] <= 0 and self.clipped_softmax[1] >= 1):
            raise ValueError(
                f"DecoderConfig.clipped_softmax is {self.clipped_softmax}: gamma must be at most 0 and zeta at least 1."
            )
        if self.head_dim is None and self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"DecoderConfig: hidden_size {self.hidden_size} does not divide into {self.num_heads} heads of even"
                " width; change num_heads or hidden_size, or set head_dim."
            )
        if self.head_size % 2:
            raise ValueError(f"DecoderConfig.head_dim is {self.head_dim}; rotary positions need an even width.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"DecoderConfig: num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}."
            )

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_heads

    def window_of(self, layer: int) -> int | None:
        """The sliding window of block `layer`, counted from 0; None if it sees everything."""
        return self.sliding_window if layer >= self.num_full_attention_layers else None


def config_from_dict(saved: Mapping[str, Any]) -> DecoderConfig:
    """The inverse of `dataclasses.asdict`; fields that an older version did not save take their defaults.

    Raises:
        ValueError: There are fields that this version does not know, or values that no decoder has.
    """
    unknown = sorted(set(saved) - {field.name for field in fields(DecoderConfig)})
    if unknown:
        raise ValueError(f"A decoder's configuration has fields unknown to this version: {', '.join(unknown)}.")
    scaling, clip = saved.get("rope_scaling"), saved.get("clipped_softmax")
    try:
        nested = {"rope_scaling": RopeScaling(**scaling) if scaling else None, "clipped_softmax": clip and tuple(clip)}
        return DecoderConfig(**{**saved, **nested})
    except (TypeError, AttributeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"A decoder's configuration has a value of another type ({error}): it is damaged.") from error


def differences(saved: Mapping[str, Any], own: DecoderConfig, among: Collection[str] | None = None) -> list[str]:
    """In words, where a saved configuration and `own` differ in the fields `among`, by default all."""
    here, there = asdict(own), {**asdict(DecoderConfig()), **saved}
    return [
        f"{name} is {here.get(name, 'missing')} here and {value} there"
        for name, value in there.items()
        if (among is None or name in among) and (name not in here or here[name] != value)
    ]
