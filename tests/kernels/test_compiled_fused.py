"""What the casts that are fused with a norm or an activation are compiled to; see `test_compiled.py`."""

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheels for this platform")

from test_compiled import (
    ALLOWANCE,
    SPILLS,
    ada_and_blackwell,
    assembly,
    check_offsets,
    elements,
    recording,
    weaker_before_3_8,
)

from lightning_fp8.kernels.outputs import WHOLE, allocate
from lightning_fp8.kernels.triton import norm, tensor, tiles
from lightning_fp8.kernels.triton.launch import launch_gated, launch_normed
from lightning_fp8.numerics import E4M3

SHAPE = (8192, 4096)


class Case(NamedTuple):
    """A cast, and how many instructions an element the slowest of its launches may take."""

    norm: bool
    tile: tuple
    budget: int
    remembered: bool = False


# An H200 runs 132 * 128 * 1.755e9 instructions a second, and 4.8e12 B/s: 6.2 instructions a byte. SwiGLU's casts read 4
# bytes and write 2, hence 37 an element; a norm's 2 and 2, hence 25.
CASES = {
    "swiglu, tensor": Case(False, WHOLE, 37),
    "swiglu, remembered": Case(False, WHOLE, 44, remembered=True),
    "swiglu, 1x128": Case(False, (1, 128), 80),
    "norm, tensor": Case(True, WHOLE, 25),
    "norm, remembered": Case(True, WHOLE, 32, remembered=True),
    "norm, 1x128": Case(True, (1, 128), 68),
}


def launches(case):
    def tensor_of(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    x, outputs = tensor_of(*SHAPE), allocate(tensor_of(*SHAPE), E4M3, case.tile, True, True)
    remembered = torch.empty((), device="meta") if case.remembered else None
    how, rstd = (E4M3, case.tile, False, remembered), torch.empty(SHAPE[0], 1, device="meta")
    if case.norm:
        calls = lambda: launch_normed(x, tensor_of(SHAPE[1]), 1e-5, *how, tensor_of(0), rstd, outputs)  # noqa: E731
    else:
        calls = lambda: launch_gated(x, tensor_of(*SHAPE), *how, outputs)  # noqa: E731
    return recording((tensor, tiles, norm), calls)


def check(case, capability, folder):
    recorded = launches(case)
    assert len(recorded) == (1 if not case.norm and case.tile != WHOLE else 2)
    for launched in recorded:
        made = assembly(launched, capability, folder)
        assert (made.usage["STACK"], made.usage["LOCAL"]) == ("0", "0")
        assert not made.count(r"(LDL|STL).*"), "registers spill"
        assert made.shared <= 48 * 1024, "more shared memory than there is without asking"
        check_offsets(made.ttir)
        held, vectors = elements(launched), 16 * made.threads
        matrices = 2 if launched.arguments.get("other_ptr") is not None and not case.norm else 1
        assert made.count(r"LDG\.E\.128.*") >= held * 2 * matrices / vectors
        layouts = sum(launched.arguments.get(name) is not None for name in ("rows_ptr", "columns_ptr"))
        assert made.count(r"STG\.E\.128.*") >= held * layouts / vectors
        if layouts:
            assert made.ptx.count("cvt.rn.satfinite.e4m3x2.f32") >= held / made.threads / 2
            assert made.count(r"F2FP\.SATFINITE\.E4M3.*") >= held / made.threads / 2
        each = sum(made.counts.values()) * made.threads / held
        print(launched.kernel.__name__, f"{each:.1f}", made.usage, made.shared)
        assert each <= case.budget * ALLOWANCE


LONGER = "Triton 3.6 takes 64 to 67 instructions an element there"
WEAKER = {"swiglu, 1x128": SPILLS, "norm, 1x128": SPILLS, "norm, remembered": LONGER}
every_case = pytest.mark.parametrize("case", weaker_before_3_8(CASES, **WEAKER))


@every_case
def test_hopper(case, tmp_path):
    check(case, 90, tmp_path)


REMEMBERED = {name: case for name, case in CASES.items() if case.remembered}


@pytest.mark.parametrize("case", weaker_before_3_8(REMEMBERED, **{"norm, remembered": LONGER}))
@ada_and_blackwell
def test_ada_and_blackwell(case, capability, tmp_path):
    check(case, capability, tmp_path)


@pytest.mark.slow
@every_case
@ada_and_blackwell
def test_ada_and_blackwell_all(case, capability, tmp_path):
    check(case, capability, tmp_path)
