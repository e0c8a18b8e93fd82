"""A layer whose input is flushed to zero leaves FP8 by itself, and returns when that is over."""

from dataclasses import replace
from functools import partial

import pytest
from faults import FP8, Aligned
from trials import run

from lightning_fp8.callbacks.guard import FallbackRule

ONSET, LAST, CALM = 30, 45, 5
RULE = FallbackRule(calm=CALM)
BENT = replace(
    FP8, steps=70, sample_every=1, faults=(partial(Aligned, ONSET, 30.0, LAST),), guard=(("fallback", RULE),)
)
LAYER = "decoder.blocks.0.mlp.down_proj"  # of the other block less is lost than the limit


@pytest.mark.slow
def test_a_layer_falls_back_within_5_steps_and_returns_when_calm() -> None:
    found = run(BENT, 0)
    switches = [(event.step, event.action, event.layer) for event in found.events if event.action != "warn"]
    print(f"\n{switches}")
    (fallen, *_), (returned, *_) = switches
    assert switches == [(fallen, "fallback", LAYER), (returned, "return", LAYER)]
    assert ONSET < fallen < ONSET + 5
    assert returned == LAST + CALM
    underflow = {r.step: r.values[LAYER]["input"]["underflow"] for r in found.readings}
    assert underflow[LAST] > 0.3  # what FP8 would do to it is looked at in BF16 too
    assert underflow[ONSET - 1] < 0.05
    assert underflow[LAST + 1] < 0.05
    advice = [event.message for event in found.events if event.metric == "input underflow"]
    assert advice
    assert all("BF16 for this layer" in message for message in advice)
