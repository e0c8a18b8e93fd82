"""What a converted layer is: a Transformer Engine module that still is the torch module it was.

`adopt` gives an `nn.Linear`, `nn.RMSNorm` or `nn.LayerNorm` the class and the attributes of a Transformer Engine module
that was built, without memory, on the meta device. The class derives from both, so `isinstance(layer, nn.Linear)` stays
true and what follows is all that behaves differently from Transformer Engine:

* The state dict has no `_extra_state`; loading one that has it, as Transformer Engine's own do, leaves it aside.
* Switched off (`fp8_autocast(enabled=False)`, `fp8_active`, `fp8_fallback`) a linear layer computes as the `nn.Linear`
  it also is.
* Any number of tokens goes: FP8 GEMMs want a multiple of 16 (MX: of 32), and zeros are padded, which change no scale.
* The FP8 copy of a weight can be kept while the weight is the same, over the micro-batches of a step.
* Where gradients are off or scales frozen, a forward pass leaves the histories as they are; Transformer Engine would
  let evaluation set later scales.
* The scaling state is made at the first FP8 forward, outside inference mode if need be (a sanity check often is the
  first), or training could not write it; what was loaded before is put in then.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_fp8.compute.autocast import fp8_enabled, scales_frozen
from lightning_fp8.compute.gemm import recording
from lightning_fp8.compute.recipe import Recipe
from lightning_fp8.compute.transformer_engine.record import note_gemms

# Name in a saved state -> (key of a module's `fp8_meta`, attribute of what lies there).
_TENSORS = {
    "scale_fwd": ("scaling_fwd", "scale"),
    "amax_history_fwd": ("scaling_fwd", "amax_history"),
    "scale_bwd": ("scaling_bwd", "scale"),
    "amax_history_bwd": ("scaling_bwd", "amax_history"),
}


class Converted(nn.Module):
    """The state dict of the torch module, whatever Transformer Engine would add to it."""

    te_plain_attributes: frozenset[str]

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}_extra_state", None)  # of a copy, made by load_state_dict
        super()._load_from_state_dict(state_dict, prefix, *args)


class ConvertedNorm(Converted):
    """A norm of Transformer Engine's."""


class ConvertedLinear(Converted, nn.Linear):
    """A linear layer of Transformer Engine's; FP8 in `transformer_engine_autocast`, high precision elsewhere."""

    fp8: bool
    fp8_meta: dict[str, Any]
    fp8_active: bool
    fp8_fallback: bool
    te_recipe: Recipe
    te_cache_weights: bool
    te_cast_version: int | None  # the version of the weight whose FP8 copy is kept
    te_loaded: Mapping[str, Tensor] | None  # scaling state that waits for the first FP8 forward

    def forward(self, input: Tensor) -> Tensor:
        """Returns x w^T + b for an input [..., K]."""
        if self.fp8_fallback or not (self.fp8_active and fp8_enabled()):
            return F.linear(input, self.weight, self.bias)
        tokens = input.numel() // self.in_features
        missing = -tokens % (32 if self.te_recipe.weight.granularity == "mx_1x32" else 16)
        run = self._train if torch.is_grad_enabled() and not scales_frozen() else self._evaluate
        if not missing:
            return run(input)
        padded = F.pad(input.reshape(tokens, self.in_features), (0, 0, 0, missing))
        return run(padded)[:tokens].view(*input.shape[:-1], self.out_features)

    def _train(self, x: Tensor) -> Tensor:
        first = None
        if self.te_cache_weights:
            first = self.te_cast_version != self.weight._version
            self.te_cast_version = self.weight._version
        return self._te_forward(x, first)

    def _evaluate(self, x: Tensor) -> Tensor:
        before = self._running_amax()
        kept = None if before is None else before.clone()
        y = self._te_forward(x, None)
        after = self._running_amax()
        if after is not None:
            after.copy_(torch.zeros_like(after) if kept is None else kept)
        return y

    def _te_forward(self, x: Tensor, is_first_microbatch: bool | None) -> Tensor:
        forward: Any = super().forward
        y: Tensor = forward(x, is_first_microbatch=is_first_microbatch)
        if recording() and self.fp8:  # which is off outside of Transformer Engine's autocast
            note_gemms(self.te_recipe, x, self.weight, y)
        return y

    def _running_amax(self) -> Tensor | None:
        """Where forward notes the magnitudes of this step: the first row of the history, zero between steps."""
        history = self.scaling_tensors().get("amax_history_fwd")
        return None if history is None else history[0]

    def scaling_tensors(self) -> dict[str, Tensor]:
        """The tensors of delayed scaling, live; empty before the first FP8 forward and without delayed scaling."""
        states = {name: (self.fp8_meta.get(key), attribute) for name, (key, attribute) in _TENSORS.items()}
        return {name: getattr(state, at) for name, (state, at) in states.items() if hasattr(state, "amax_history")}

    def load_scaling_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Puts `saved` into the scaling state, now or as soon as there is one."""
        live = self.scaling_tensors()
        self.te_loaded = None if live else saved
        for name, tensor in live.items():
            tensor.copy_(saved[name])

    def init_fp8_meta_tensors(self, recipe: Any) -> None:
        """Makes the scaling state; Transformer Engine calls it in the first FP8 forward."""
        make: Any = super()
        with torch.inference_mode(False):
            make.init_fp8_meta_tensors(recipe)
            if self.te_loaded is not None:
                self.load_scaling_tensors(self.te_loaded)

    def reset_parameters(self) -> None:
        """Initialises in place, as `nn.Linear` does; Transformer Engine would make new Parameters."""
        nn.Linear.reset_parameters(self)


@cache
def layer_types() -> dict[type[nn.Module], type[Converted]]:
    """The class that takes the place of each torch class; made once, when Transformer Engine is first needed."""
    import transformer_engine.pytorch as te

    def both(converted: type[Converted], theirs: type[nn.Module], ours: type[nn.Module]) -> type[Converted]:
        namespace = {"__module__": __name__, "__doc__": f"Transformer Engine's {theirs.__name__} in place of torch's."}
        return type(f"TransformerEngine{ours.__name__}", (converted, theirs, ours), namespace)

    return {
        nn.Linear: both(ConvertedLinear, te.Linear, nn.Linear),
        nn.RMSNorm: both(ConvertedNorm, te.RMSNorm, nn.RMSNorm),
        nn.LayerNorm: both(ConvertedNorm, te.LayerNorm, nn.LayerNorm),
    }


def adopt(layer: nn.Module, name: str) -> None:
    """Turns `layer`, exactly of one of the three torch classes, into a Transformer Engine module in place."""
    import transformer_engine.pytorch as te

    swapped: Any = layer
    dtype = swapped.weight.dtype
    donor: nn.Module
    if isinstance(layer, nn.Linear):
        sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
        donor = te.Linear(*sizes, bias=bias, params_dtype=dtype, device="meta", name=name or None)
    else:
        norm = te.RMSNorm if isinstance(layer, nn.RMSNorm) else te.LayerNorm
        donor = norm(swapped.normalized_shape, eps=swapped.eps, dtype=dtype, device="meta")
    plain = frozenset(layer.__dict__) | frozenset(layer._parameters)
    layer.__dict__.update({key: value for key, value in donor.__dict__.items() if key not in plain})
    swapped.te_plain_attributes = plain
    swapped.__class__ = layer_types()[type(layer)]


def abandon(layer: nn.Module) -> bool:
    """Turns a converted layer back into what it was; returns whether it was one."""
    if not isinstance(layer, Converted):
        return False
    plain = next(plain for plain, kind in layer_types().items() if type(layer) is kind)
    swapped: Any = layer
    for attribute in layer.__dict__.keys() - swapped.te_plain_attributes:
        del layer.__dict__[attribute]
    swapped.__class__ = plain
    return True
