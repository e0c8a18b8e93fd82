"""What the step of `FP8AdamW` is compiled to, for three generations of GPUs; see `test_compiled.py`."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheels for this platform")

from test_compiled import ALLOWANCE, ada_and_blackwell, assembly, recording

from lightning_fp8.kernels.adamw import Group, Matrix
from lightning_fp8.kernels.triton import launch_adamw
from lightning_fp8.kernels.triton.adamw import TILE
from lightning_fp8.numerics.moments import FP8Moments

META = torch.device("meta")
ELEMENTS = TILE // 128  # a thread's
# At 10.2 bytes of a parameter an H200 reads and writes 4.8e12 / 10.2 of them a second, and its special-function units
# take 132 * 16 * 1.755e9: 7.9 of a parameter. The same way 132 * 128 * 1.755e9 are 63 instructions of any kind, less
# than half of what there is: the step is bound by arithmetic.
# Triton before 3.9 decodes twice rather than pass on what a weight becomes, and then spills four registers at worst.
AGAIN = ALLOWANCE - 1
SPECIAL = 7.9 + 1.4 * AGAIN
INSTRUCTIONS = 152 + 52 * AGAIN


def launched(dtype, count, columns=4096, counted=False):
    """What a step of `count` parameters launches."""
    moments = FP8Moments.zeros(1024, columns, 128, META)
    tensors = [torch.empty(1024, columns, dtype=dtype, device=META) for _ in range(2)]
    matrix = Matrix(*tensors, moments, 0, 0, (1, 2))
    group = Group(0.9, 0.1, 0.999, 0.001, 1e-8, None)
    steps, numbers = torch.empty(count, dtype=torch.int32, device=META), torch.empty(count, 5, device=META)
    finite, counts = torch.ones((), device=META).bool(), torch.empty(count, 6, device=META) if counted else None
    (found,) = recording(
        (launch_adamw,),
        lambda: launch_adamw.launch([matrix] * count, steps, numbers, group, 128, finite, counts),
    )
    return found


def check(dtype, count, capability, folder):
    made = assembly(launched(dtype, count), capability, folder)
    assert (int(made.usage["STACK"]), int(made.usage["LOCAL"])) <= (16 * AGAIN, 0)
    assert made.count(r"(LDL|STL).*") <= 8 * AGAIN, "registers spill"
    assert int(made.usage["REG"]) <= 170, "fewer than three programs, twelve warps, fit"
    assert made.shared <= 48 * 1024
    wide = re.findall(r"tt\.addptr .* : tensor<[\dx]+!tt\.ptr<\w+>>, tensor<[\dx]*(i\d+)>", made.ttir)
    assert wide.count("i64") == 4  # weights, gradients, codes; the numbers of blocks are below 2^31
    looked_up = re.findall(r"tt\.addptr .* : tensor<\d+x\d+x!tt\.ptr<f32>>, tensor<\d+x\d+xi32>", made.ttir)
    assert len(looked_up) == 1  # levels of m
    assert not re.search(r"tt\.addptr .* : tensor<\d+x\d+x!tt\.ptr<i\d+>>, tensor<\d+x\d+xi32>", made.ttir)
    vectors = 16 * made.threads  # bytes that one instruction of all threads moves
    held = TILE * dtype.itemsize / vectors
    assert made.count(r"LDG\.E\.128.*") >= 2 * held + 2 * TILE / vectors
    assert made.count(r"STG\.E\.128.*") >= held + 2 * TILE / vectors
    assert made.ptx.count("cvt.rn.satfinite.e4m3x2.f32") == ELEMENTS / 2
    assert set(re.findall(r"[\w.]+\.ftz[\w.]*", made.ptx)) <= {
        *("ex2.approx.ftz.f32", "lg2.approx.ftz.f32", "rcp.approx.ftz.f32", "sqrt.approx.ftz.f32"),
        "cvt.rmi.ftz.f32.f32",  # a floor, of what is never between -2^-126 and 0
    }
    # Multiplications and additions are rounded one by one, but where a fused one is meant: logarithms of a lattice.
    assert made.ptx.count("fma.rn.f32") <= (10.5 + 3.5 * AGAIN) * ELEMENTS
    special = made.count(r"(MUFU|I2F|F2I|FRND|F2F)(\..*)?")
    assert 6 * ELEMENTS <= special <= SPECIAL * ELEMENTS
    assert sum(made.counts.values()) <= INSTRUCTIONS * ELEMENTS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_on_hopper(dtype, tmp_path):
    check(dtype, 300, 90, tmp_path)


def test_one_on_hopper(tmp_path):
    check(torch.bfloat16, 1, 90, tmp_path)


@ada_and_blackwell
def test_ada_and_blackwell(capability, tmp_path):
    check(torch.bfloat16, 300, capability, tmp_path)


def test_rows_that_do_not_begin_on_16_bytes_are_stepped_all_the_same(tmp_path):
    found = launched(torch.bfloat16, 2, columns=4095)
    assert found.arguments["ALIGNMENT"] == 1
    made = assembly(found, 90, tmp_path)
    assert not made.count(r"(LDL|STL).*")
    assert not made.count(r"STG\.E\.128.*")


def test_counting_spills_nothing(tmp_path):
    made = assembly(launched(torch.bfloat16, 300, counted=True), 90, tmp_path)
    assert not made.count(r"(LDL|STL).*")
    assert made.count(r"(RED|ATOM|ATOMG)\..*") == 7  # six counts, a largest number of either sign by two
