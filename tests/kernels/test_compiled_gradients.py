"""What the passes of a gradient reduction are compiled to; see `test_compiled.py`."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheels for this platform")

from test_compiled import ALLOWANCE, assembly, in_software, recording

from lightning_fp8.kernels.triton import launch_gradients
from lightning_fp8.kernels.triton.gradients import TILE
from lightning_fp8.numerics import E4M3, E5M2

META, RANKS, SIZE = torch.device("meta"), 8, 1 << 20


def launched(name, fmt):
    gradients = [torch.empty(SIZE, dtype=torch.bfloat16, device=META) for _ in range(3)]
    codes = torch.empty(3 * SIZE, dtype=torch.uint8, device=META)
    numbers, counts = torch.empty(3, device=META), torch.empty(3, dtype=torch.int32, device=META)
    edges = [SIZE * i for i in range(4)]
    calls = {
        "encode": lambda: launch_gradients.encode(gradients, numbers, fmt, codes, counts),
        "decode": lambda: launch_gradients.decode(gradients, codes, numbers, fmt),
        "accumulate": lambda: launch_gradients.accumulate(
            codes.expand(RANKS, -1), edges[:-1], edges[1:], numbers, fmt, codes, counts, counts
        ),
    }
    (found,) = recording((launch_gradients,), calls[name])
    return found


# Bytes read and written an element in vectors of 16, and instructions of it: 132 * 128 * 1.755e9 a second are 18 of an
# element at 3 bytes of it on an H200, and 6 of an element and rank at one.
PASSES = {"encode": (2, 1, 32), "decode": (1, 2, 14), "accumulate": (1, 1, 24)}


def check(name, fmt, capability, folder):
    made = assembly(launched(name, fmt), capability, folder)
    read, written, budget = PASSES[name]
    assert (made.usage["STACK"], made.usage["LOCAL"]) == ("0", "0")
    assert not made.count(r"(LDL|STL).*"), "registers spill"
    assert made.shared <= 48 * 1024
    assert ".ftz" not in made.ptx, "subnormal numbers are flushed to zero"
    vectors = 16 * made.threads
    assert made.count(r"LDG\.E\.128.*") >= TILE * read / vectors
    assert made.count(r"STG\.E\.128.*") >= TILE * written / vectors
    if name != "decode":
        assert made.ptx.count(f"cvt.rn.satfinite.{fmt.name}x2.f32") >= TILE / made.threads / 2
    if name != "encode":
        assert made.ptx.count(f"cvt.rn.f16x2.{fmt.name}x2") >= TILE / made.threads / 2
    assert sum(made.counts.values()) * made.threads / TILE <= budget * ALLOWANCE
    wide = [line for line in made.ttir.splitlines() if "tt.addptr" in line and f"tensor<{TILE}x" in line]
    assert wide
    assert all(f"tensor<{TILE}xi64>" in line for line in wide)


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("name", PASSES)
def test_hopper(name, fmt, tmp_path):
    check(name, fmt, 90, tmp_path)


@pytest.mark.parametrize("name", PASSES)
def test_blackwell(name, tmp_path):
    check(name, E4M3, 100, tmp_path)


@in_software
@pytest.mark.parametrize("name", ["decode", "accumulate"])  # casts: `hardware.compiles_gradient_casts`
def test_ada(name, tmp_path):
    check(name, E4M3, 89, tmp_path)
