import math
from dataclasses import replace

import pytest
import torch

from lightning_fp8.models import DecoderConfig
from lightning_fp8.models.config import RopeScaling
from lightning_fp8.models.rope import frequencies, rotary_tables, rotate

CONFIG = DecoderConfig(hidden_size=64, num_heads=4, num_kv_heads=4)  # heads of 16: 8 pairs
PLAIN = [10000 ** (-i / 8) for i in range(8)]
CPU = torch.device("cpu")


def of(scaling: RopeScaling | None) -> list[float]:
    return frequencies(replace(CONFIG, rope_scaling=scaling), CPU)[0].tolist()


def test_no_scaling() -> None:
    assert of(None) == pytest.approx(PLAIN, rel=1e-6)


def test_linear_divides_every_frequency() -> None:
    """So position 4 p under factor 4 is position p without: interpolation."""
    assert of(RopeScaling("linear", 4.0)) == pytest.approx([f / 4 for f in PLAIN], rel=1e-6)
    scaled = rotary_tables(torch.arange(12) * 4, replace(CONFIG, rope_scaling=RopeScaling("linear", 4.0)))
    for table, expected in zip(scaled, rotary_tables(torch.arange(12), CONFIG), strict=True):
        torch.testing.assert_close(table, expected, rtol=0, atol=1e-6)


def test_ntk_keeps_the_highest_and_divides_the_lowest() -> None:
    scaled = of(RopeScaling("ntk", 4.0))
    assert scaled[0] == 1
    assert scaled[-1] == pytest.approx(PLAIN[-1] / 4, rel=1e-5)
    assert all(f / 4 < s < f for f, s in zip(PLAIN[1:-1], scaled[1:-1], strict=True))


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_what_turns_often_is_kept_and_what_turns_seldom_is_divided(kind: str) -> None:
    scaling = RopeScaling(kind, 8.0, original_context=512)
    often = 4 if kind == "llama3" else 32
    scaled, mixed = of(scaling), 0
    for f, s in zip(PLAIN, scaled, strict=True):
        turns = 512 * f / (2 * math.pi)
        if turns > often:
            assert s == pytest.approx(f, rel=1e-6)
        elif turns < 0.5:  # yarn's boundary is rounded up to a pair
            assert s == pytest.approx(f / 8, rel=1e-6)
        else:
            assert f / 8 * (1 - 1e-6) <= s <= f
            mixed += f / 8 * 1.01 < s < f * 0.99
    assert mixed >= 1


def test_yarn_sharpens_attention() -> None:
    for given, expected in ((None, 0.1 * math.log(8) + 1), (1.5, 1.5)):
        config = replace(CONFIG, rope_scaling=RopeScaling("yarn", 8.0, original_context=512, attention_factor=given))
        cos, sin = rotary_tables(torch.arange(9), config)
        torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, expected**2))


def test_a_rotation_and_its_gradient_are_rounded_once() -> None:
    """In bf16 both are what fp32 gives, rounded at the end: the two parts of a gradient are added up before."""
    tables = rotary_tables(torch.arange(9), CONFIG)
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(2, 3, 9, 16, generator=generator).bfloat16() for _ in range(2))
    (narrow, dx), (wide, dx_wide) = (_rotated(x.to(dtype), dy.to(dtype), tables) for dtype in (x.dtype, torch.float32))
    torch.testing.assert_close(narrow, wide.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(dx, dx_wide.bfloat16(), rtol=0, atol=0)


def _rotated(x: torch.Tensor, dy: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    y = rotate(x.requires_grad_(), *tables)
    return [y, *torch.autograd.grad(y, x, dy)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "dynamic", "factor": 2.0}, "'dynamic' is not one of linear, ntk, yarn, llama3"),
        ({"kind": "linear", "factor": 0.5}, "factor is 0.5; it must be at least 1"),
        ({"kind": "yarn", "factor": 2.0}, "yarn needs original_context"),
        ({"kind": "llama3", "factor": 2.0, "original_context": 8, "high_freq_factor": 1.0}, "must rise from above 0"),
    ],
)
def test_errors_name_the_field(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeScaling(**fields)
