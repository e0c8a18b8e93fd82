"""What the kernels are compiled to, for three generations of GPUs, on a machine that has none.

Triton compiles for a named target without a device, and ships the tools that take machine code apart. What is compiled
is what `launch` launches for a layer of usual size: it is called with tensors that have no memory, and a recorder
stands where the kernels are.
"""

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has no wheels for this platform")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from lightning_fp8.kernels.outputs import WHOLE, allocate  # noqa: E402
from lightning_fp8.kernels.triton import lines, tensor, tiles  # noqa: E402
from lightning_fp8.kernels.triton.launch import launch  # noqa: E402
from lightning_fp8.numerics import E4M3, E5M2  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}


class Launch(NamedTuple):
    """A kernel and the arguments it was launched with."""

    kernel: JITFunction
    arguments: dict


def recording(modules, launch):
    """What `launch()` launches of the kernels of `modules`."""
    recorded = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            assert all(isinstance(size, int) and size > 0 for size in grid)
            return lambda *given, **named: recorded.append(
                Launch(self.kernel, dict(zip(self.kernel.arg_names, given, strict=False)) | named)
            )

    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            for name, kernel in list(vars(module).items()):
                if name.endswith("_kernel"):
                    patch.setattr(module, name, Recorder(kernel))
        launch()
    return recorded


def launches(dtype, fmt, tile, power_of_two, remembered, rows, columns, shape=(8192, 4096)):
    """What `launch` launches for such a cast."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    scale = torch.empty((), device="meta") if remembered else None
    outputs = allocate(x, fmt, tile, rows, columns)
    return recording((tensor, lines, tiles), lambda: launch(x, fmt, tile, power_of_two, scale, outputs))


def compiled(launched, capability):
    """The kernel as Triton compiles it on its first launch with these arguments: alignment is what it looks at."""
    kernel, arguments = launched
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else f"*{TYPES[value.dtype]}"
        looked_at = signature[parameter.name] not in ("constexpr", "fp32") and not parameter.do_not_specialize
        if looked_at and (not isinstance(value, int) or value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": arguments["num_warps"], "enable_fp_fusion": arguments.get("enable_fp_fusion", True)}
    options |= {"maxnreg": arguments["maxnreg"]} if "maxnreg" in arguments else {}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


class Assembly(NamedTuple):
    """What a kernel's machine code does."""

    counts: Counter
    usage: dict
    ttir: str
    ptx: str
    shared: int
    threads: int

    def count(self, pattern):
        return sum(count for name, count in self.counts.items() if re.fullmatch(pattern, name))


def assembly(launched, capability, folder):
    kernel = compiled(launched, capability)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])

    def tool(name, *options):
        run = subprocess.run([TOOLS / name, *options, cubin], capture_output=True, text=True, check=True, timeout=120)
        return run.stdout + run.stderr

    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", tool("cuobjdump", "-res-usage")))
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", tool("nvdisasm"))
    threads = 32 * launched.arguments["num_warps"]
    text = kernel.asm
    return Assembly(Counter(code), usage, text["ttir"], text["ptx"], kernel.metadata.shared, threads)


# Triton before 3.9 computes codes a second time rather than turn them in shared memory, and has twice the budget.
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
ALLOWANCE = 1 if VERSION >= (3, 9) else 2


class Case(NamedTuple):
    tile: tuple
    power_of_two: bool = False
    remembered: bool = False
    rows: bool = True
    columns: bool = True
    format: object = E4M3
    dtype: torch.dtype = torch.bfloat16
    budget: int = 28  # instructions an element of the slowest launch


# The budget is where arithmetic would take as long as memory: an H200 runs 132 * 128 * 1.755e9 instructions a second,
# and 4.8e12 B/s are 1.2e12 elements a second at 2 + 2 bytes each, hence 25 for each of them, 33 at 5 bytes.
CASES = {
    "tensor": Case(WHOLE, budget=22),
    "tensor, rows": Case(WHOLE, columns=False, budget=16),
    "tensor, e5m2": Case(WHOLE, format=E5M2, budget=22),
    "tensor, remembered": Case(WHOLE, remembered=True, budget=28),
    "row": Case((1, None), power_of_two=True, budget=22),
    "row, rows": Case((1, None), power_of_two=True, columns=False, budget=12),
    "row, columns": Case((1, None), power_of_two=True, rows=False, budget=18),
    "1x128, powers of two": Case((1, 128), power_of_two=True, budget=32),
    "1x128": Case((1, 128), budget=64),
    "1x32": Case((1, 32), power_of_two=True, budget=44),
    "128x128": Case((128, 128), budget=26),
    "128x128, columns": Case((128, 128), rows=False, budget=26),
}


def weaker_before_3_8(cases, **reasons):
    """The cases as parameters; those that have a reason may fail where Triton is older."""
    marks = {name: pytest.mark.xfail(VERSION < (3, 8), reason=reason, strict=False) for name, reason in reasons.items()}
    return [pytest.param(cases[name], id=name, marks=marks.get(name, ())) for name in cases]


SPILLS = "Triton 3.6 spills 24 bytes a thread there"
every_case = pytest.mark.parametrize("case", weaker_before_3_8(CASES, **{"1x128": SPILLS}))


def check(case, capability, folder):
    recorded = launches(case.dtype, case.format, case.tile, case.power_of_two, case.remembered, case.rows, case.columns)
    assert recorded
    for launched in recorded:
        made = assembly(launched, capability, folder)
        assert sum(made.counts.values()) > 50
        assert (made.usage["STACK"], made.usage["LOCAL"]) == ("0", "0")
        assert not made.count(r"(LDL|STL).*"), "registers spill"
        assert made.shared <= 48 * 1024, "more shared memory than there is without asking"
        assert ".ftz" not in made.ptx, "subnormal numbers are flushed to zero"
        check_offsets(made.ttir)
        held = elements(launched)
        vectors = 16 * made.threads  # bytes that one instruction of all threads moves
        assert made.count(r"LDG\.E\.128.*") >= held * case.dtype.itemsize / vectors
        layouts = [launched.arguments.get(name) is not None for name in ("rows_ptr", "columns_ptr")]
        assert made.count(r"STG\.E\.128.*") >= held * sum(layouts) / vectors
        if any(layouts):
            conversion = f"cvt.rn.satfinite.{case.format.name}x2.f32"
            assert made.ptx.count(conversion) >= held / made.threads / 2
            assert made.count(rf"F2FP\.SATFINITE\.{case.format.name.upper()}.*") >= held / made.threads / 2
        assert sum(made.counts.values()) * made.threads / held <= case.budget * ALLOWANCE


def elements(launched):
    """How many a program holds."""
    given = launched.arguments
    if "SIDE" in given:
        return given["SIDE"] ** 2
    return given["BLOCK"] if "BLOCK" in given else given.get("BM", 1) * given["BK"]


def check_offsets(ttir):
    """Offsets are 64 bits wide, and nothing but what a program starts from was ever narrower."""
    defined = dict(re.findall(r"(%[\w#]+)(?::\d+)? = ([\w.]+)", ttir))
    wide = re.findall(r"tt\.addptr .* : tensor<[\dx]+!tt\.ptr<\w+>>, tensor<[\dx]*(i\d+)>", ttir)
    assert wide
    assert set(wide) == {"i64"}
    starts = ("tt.get_program_id", "tt.make_range", "arith.divsi", "arith.remsi", "tt.splat", "tt.expand_dims")
    for name in re.findall(r"arith\.extsi (%[\w#]+) : \S+ to \S*i64", ttir):
        assert name not in defined or defined[name] in starts, f"{name} = {defined[name]} is computed in 32 bits"


@every_case
def test_hopper(case, tmp_path):
    check(case, 90, tmp_path)


in_software = pytest.mark.skipif(VERSION < (3, 9), reason="Triton before 3.9 converts to FP8 in software on sm_89")
ada_and_blackwell = pytest.mark.parametrize(
    "capability",
    [pytest.param(89, marks=in_software), 100],
)


@pytest.mark.parametrize("case", ["tensor, remembered", "128x128"])
@ada_and_blackwell
def test_ada_and_blackwell(case, capability, tmp_path):
    check(CASES[case], capability, tmp_path)


@pytest.mark.slow
@every_case
@ada_and_blackwell
def test_ada_and_blackwell_all(case, capability, tmp_path):
    check(case, capability, tmp_path)
