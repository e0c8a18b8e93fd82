"""Parity on a task that needs the blocks, with a control whose blocks are dead.

Paired: weights and data of an FP8 run are those of the BF16 run with its seed. The width is 64, for narrower tensors
keep their moments in fp32, and the learning rate falls to zero, for at a constant one equal runs end up to 2 % apart.
"""

from dataclasses import replace

import pytest
from faults import moments
from trained_decoders import DEAD_LOSS_SCALE, without_scales
from trials import Setup, run, skips

SEEDS = (0, 1, 2)
BF16 = Setup(skips, steps=300, lr=1e-2, sample_every=300)
ARMS = {
    "FP8 GEMMs": replace(BF16, recipe="tensorwise"),
    "FP8 end to end": replace(BF16, recipe="tensorwise", weights="bf16", optimizer=moments),
    "dead blocks": replace(BF16, prepare=without_scales, loss_scale=DEAD_LOSS_SCALE),
}


@pytest.mark.slow
def test_fp8_learns_as_bf16_does_where_dead_blocks_do_not() -> None:
    plain = [run(BF16, seed).loss for seed in SEEDS]
    print(f"\nBF16 {plain}")
    gaps = {}
    for name, setup in ARMS.items():
        losses = [run(setup, seed).loss for seed in SEEDS]
        gaps[name] = sum(loss / base - 1 for loss, base in zip(losses, plain, strict=True)) / len(SEEDS)
        print(f"{name} {losses}, mean gap {gaps[name]:+.2%}")
    assert abs(gaps["FP8 GEMMs"]) <= 0.005
    assert abs(gaps["FP8 end to end"]) <= 0.005
    assert gaps["dead blocks"] >= 0.5
