"""Layers whose inputs are flushed to zero leave FP8 by themselves, and return when that is over."""

from dataclasses import replace
from functools import partial

import pytest
from faults import FP8, Aligned
from trials import run

from lightning_fp8.callbacks.guard import FallbackRule

ONSET, LAST, CALM = 30, 45, 5
RULE = FallbackRule(calm=CALM)
BENT = replace(
    FP8, steps=70, sample_every=1, faults=(partial(Aligned, ONSET, 120.0, LAST),), guard=(("fallback", RULE),)
)
LAYERS = [f"decoder.blocks.{block}.mlp.down_proj" for block in range(2)]


@pytest.mark.slow
def test_layers_fall_back_within_5_steps_and_return_when_calm() -> None:
    found = run(BENT, 0)
    switches = [(event.step, event.action, event.layer) for event in found.events if event.action != "warn"]
    print(f"\n{switches}")
    fallen = [step for step, action, _ in switches if action == "fallback"]
    back = LAST + CALM
    assert switches == [
        *((step, "fallback", layer) for step, layer in zip(fallen, LAYERS, strict=True)),
        *((back, "return", layer) for layer in LAYERS),
    ]
    assert all(ONSET < step < ONSET + 5 for step in fallen)
    for layer in LAYERS:
        underflow = {r.step: r.values[layer]["input"]["underflow"] for r in found.readings}
        assert underflow[LAST] > 0.3  # what FP8 would do to it is looked at in BF16 too
        assert underflow[ONSET - 1] < 0.05
        assert underflow[LAST + 1] < 0.05
    advice = [event.message for event in found.events if event.metric == "input underflow"]
    assert advice
    assert all("BF16 for this layer" in message for message in advice)
