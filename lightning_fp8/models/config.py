"""The shape of a decoder, as data."""

from dataclasses import dataclass


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
        qk_norm: RMS-normalise queries and keys a head; widens the range of stable learning rates.
        tied_embeddings: The head shares the embedding's weight.
        init_std: Standard deviation of the initial weights; that of the two projections into the residual stream is
            divided by sqrt(2 * num_layers).
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

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "intermediate_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"DecoderConfig.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"DecoderConfig: hidden_size {self.hidden_size} does not divide into {self.num_heads} heads of even"
                " width; change num_heads or hidden_size."
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"DecoderConfig: num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}."
            )

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads
