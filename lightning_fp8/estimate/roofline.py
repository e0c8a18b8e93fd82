"""How long a training step takes: a roofline of its parts, and one factor a device for all that it leaves out.

    linear layers   three GEMMs each, and the casts of FP8 (`compute/speed.py`); the head in bf16
    attention       3.5 times the FLOPs of forward, half the square of the sequence, at 35 % of the bf16 peak: what
                    FlashAttention-2 reaches on an H100 (Shah et al., 2407.08608, section 1)
    the rest        norms, rotations, SwiGLU, residual additions, the loss over the logits and the optimizer's step
                    are read and written once, as compilers fuse them
    network         the bytes of `traffic.py`, at 80 % of the link's rate, behind the computation as far as it lasts

    seconds of a step = max((compute + memory) / efficiency, network)

The efficiency is fitted on published runs of torchtitan with Llama-3-8B, and `benchmarks/roofline.py` says how far off
it is elsewhere. It belongs to that stack as much as to the device: with Megatron's fused kernels others measured up to
2.4 times the speed. A device that nobody has published such a run of gets the H100's, a guess.
"""

from typing import Literal, NamedTuple

from lightning_fp8.compute.recipe import Recipe
from lightning_fp8.compute.speed import LayerSize, Work, stream, work
from lightning_fp8.estimate.setup import Communication, Setup, layers
from lightning_fp8.estimate.traffic import bytes_per_step
from lightning_fp8.hardware import ACCELERATORS, NODE_SIZE, Accelerator
from lightning_fp8.models.recompute import Recompute

EFFICIENCY = {"h100": 0.744, "h200": 0.819, "b200": 0.397, "mi300x": 0.435}
"""Of `hardware.ACCELERATORS`; what `benchmarks/roofline.py` fits."""
_ATTENTION_OF_PEAK, _NETWORK_EFFICIENCY = 0.35, 0.8
_LOGIT_BYTES = 2 + 4 + 4 + 4 + 4 + 2  # moved by the loss: read in bf16, to fp32, softmax, gradient, back to bf16

Resource = Literal["compute", "memory", "network"]


class Again(NamedTuple):
    """Shares of a block's forward pass that backward computes a second time."""

    gemms: float
    attention: float
    rest: float


RECOMPUTED: dict[Recompute, Again] = {"none": Again(0, 0, 0), "selective": Again(0, 0, 1), "full": Again(1, 1, 1)}


class Prediction(NamedTuple):
    """A training step.

    Attributes:
        seconds: It takes.
        tokens_per_second: Of a device.
        work: What the device does, before the efficiency.
        network: Seconds that devices send.
    """

    seconds: float
    tokens_per_second: float
    work: Work
    network: float

    @property
    def bound_by(self) -> Resource:
        """What most of the time goes to."""
        if self.network >= self.seconds:
            return "network"
        return "compute" if self.work.compute >= self.work.memory else "memory"


def predict_step(
    setup: Setup,
    how: Communication,
    recipe: Recipe | None,
    *,
    efficiency: float | None = None,
    again: Again | None = None,
) -> Prediction:
    """Predicts a step.

    Args:
        setup: The step.
        how: What devices send each other.
        recipe: Of the linear layers, or None for bf16.
        efficiency: Instead of the fitted one.
        again: What is computed twice, if not as `setup.recompute` says.
    """
    parts = device_work(setup, how, recipe, again or RECOMPUTED[setup.recompute])
    device = setup.hardware
    rate = device.link if setup.devices <= NODE_SIZE else device.network
    network = bytes_per_step(setup, how, recipe) / (rate * _NETWORK_EFFICIENCY)
    seconds = max(parts.seconds / (efficiency or fitted_efficiency(device)), network)
    return Prediction(seconds, setup.tokens / seconds, parts, network)


def fitted_efficiency(device: Accelerator) -> float:
    """The factor of `device`, or the H100's where there is nothing to fit one on."""
    return next((EFFICIENCY[key] for key in EFFICIENCY if ACCELERATORS[key] == device), EFFICIENCY["h100"])


def device_work(setup: Setup, how: Communication, recipe: Recipe | None, again: Again) -> Work:
    """What one device does in a step."""
    config, device, tokens = setup.config, setup.hardware, setup.tokens
    sizes = layers(config)
    linears = sum((work(LayerSize(tokens, k, n), recipe, device) for k, n in sizes.linears), Work(0, 0))
    q, kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    seen = min(config.sliding_window or setup.length, setup.length)
    products = 2 * 2 * tokens * q * (seen / 2 if seen == setup.length else seen)  # forward, causal
    attention = products / (device.bf16 * _ATTENTION_OF_PEAK)
    d, f = config.hidden_size, config.intermediate_size
    rest = stream(2 * tokens * (8 * d + 4 * (q + kv) + 3 * f), device)  # forward, in bf16
    block = linears.times(1 + again.gemms / 3) + Work(attention * (3.5 + again.attention), rest * (3 + again.rest))
    head = work(LayerSize(tokens, *sizes.head), None, device)
    head += Work(0, stream(tokens * config.vocab_size * _LOGIT_BYTES, device))
    owned = sizes.parameters / (setup.devices if how.sharded else 1)
    step = Work(0, stream(owned * (2 * setup.state_bytes + setup.grad_bytes), device))
    return block.times(config.num_layers) + head + step
