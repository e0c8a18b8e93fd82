"""The only place that asks a device, a driver or an import what it can do."""

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec

import torch

# Asked once, when the module is imported: a compiled graph cannot ask.
_CPU_HAS_MATRIX_UNITS = bool(torch.cpu.get_capabilities().get("amx_bf16", False))
_OLDEST_TRANSFORMER_ENGINE = (2, 20)
INSTALL_TRANSFORMER_ENGINE = (
    'pip install --no-build-isolation "lightning-fp8[te]" (it is compiled against the torch that is installed, so'
    " setuptools, wheel, ninja and pybind11 must be, too)"
)


def emulation_dtype(device_type: str) -> torch.dtype:
    """The dtype in which an emulated FP8 GEMM runs fastest on this kind of device.

    FP8 values are exact in bf16 and in fp32, and both accumulate in fp32, so the choice costs speed alone, not
    correctness: bf16 rounds the result once more before it is scaled. GPUs, and CPUs with matrix units for bf16
    (AMX), run bf16; a CPU without them runs fp32: GEMMs, or where it can the kernel of `kernels/gemm.py`.

    Args:
        device_type: As in `torch.device.type`.
    """
    return torch.bfloat16 if device_type != "cpu" or _CPU_HAS_MATRIX_UNITS else torch.float32


def why_not_native(granularities: Collection[str]) -> str | None:
    """Why this machine's hardware cannot run FP8 GEMMs with operands scaled so; None if it can.

    The rules are cuBLASLt's and those of torch's `scaled_mm` (see `compute/gemm/rules.py`).

    Args:
        granularities: As in `compute.recipe.Operand.granularity`.
    """
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip:
        return "on AMD devices it has not been tried"
    capability = torch.cuda.get_device_capability()
    device = f"{torch.cuda.get_device_name()} (sm_{capability[0]}{capability[1]})"
    if capability < (8, 9):
        return f"{device} has no FP8 GEMMs; they need sm_89 (Ada) or later"
    for granularity in granularities:
        needs, can = {
            "tensor": ("", True),
            "row": ("sm_89 to sm_100", capability[0] < 12),
            "block_1x128": ("sm_90 (Hopper) and CUDA 12.9", capability[0] == 9 and _cuda_version() >= (12, 9)),
            "block_128x128": ("sm_90 (Hopper) and CUDA 12.9", capability[0] == 9 and _cuda_version() >= (12, 9)),
            "mx_1x32": ("sm_100 (Blackwell) or later", capability[0] >= 10),
        }[granularity]
        if not can:
            return f"scales by {granularity} need {needs}, this is {device} with CUDA {torch.version.cuda}"
    return None


def why_not_transformer_engine(granularity: str) -> str | None:
    """Why Transformer Engine cannot run FP8 GEMMs with weights scaled so here, with the remedy; None if it can.

    Args:
        granularity: As in `compute.recipe.Operand.granularity`.
    """
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    problem = what_ails_transformer_engine()
    if problem:
        return f"{problem}. {INSTALL_TRANSFORMER_ENGINE}"
    import transformer_engine.pytorch as te

    ask = {
        "block_1x128": te.is_fp8_block_scaling_available,
        "block_128x128": te.is_fp8_block_scaling_available,
        "mx_1x32": te.is_mxfp8_available,
    }.get(granularity, te.is_fp8_available)
    can, reason = ask(return_reason=True)
    return None if can else str(reason).rstrip(".")


def what_ails_transformer_engine() -> str | None:
    """Why Transformer Engine, whatever the device, cannot be used as it is installed; None if it can."""
    try:
        import transformer_engine
        import transformer_engine.pytorch
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # of many kinds: libraries that are not found, parts of different versions
        return f"Transformer Engine does not import ({type(error).__name__}: {error})"
    version = tuple(int(part) for part in transformer_engine.__version__.split(".")[:2])
    if version < _OLDEST_TRANSFORMER_ENGINE:
        return f"Transformer Engine {transformer_engine.__version__} is older than 2.20"
    return None


def _cuda_version() -> tuple[int, ...]:
    return tuple(int(part) for part in (torch.version.cuda or "0.0").split("."))


def runs_kernels() -> bool:
    """Whether this machine's CUDA device runs the library's Triton kernels: they need conversions to FP8."""
    return _runs_kernels()


torch.compiler.assume_constant_result(runs_kernels)  # a compiled graph cannot ask


@cache
def _runs_kernels() -> bool:
    if not torch.cuda.is_available() or torch.version.hip or find_spec("triton") is None:
        return False
    capability = torch.cuda.get_device_capability()
    # On sm_89 Triton 3.6 converts to FP8 in software of its own, whose roundings nobody has proved.
    return capability >= (9, 0) or (capability == (8, 9) and _version_of("triton") >= (3, 9))


def compiles_gradient_casts() -> bool:
    """Whether the kernel that casts gradients for a reduction can be compiled for this machine's CUDA device.

    For sm_89 the ptxas of Triton 3.9 crashes on it, or does not end.
    """
    return runs_kernels() and torch.cuda.get_device_capability() >= (9, 0)


def _version_of(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in metadata.version(package).split(".")[:2])


def device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the device of `x` the current one, on which kernels are launched."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def wait_for(device: torch.device) -> None:
    """Returns when all that was asked of `device` is done; CPUs are done when they return."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_type() -> str:
    """Of the device that training would use."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def describe_device() -> str:
    """The device that training would use, in words."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} (sm_{major}{minor}), {torch.cuda.device_count()} of them"
    return f"CPU, {torch.get_num_threads()} threads"


def describe_fp8() -> str:
    """How FP8 GEMMs run on this machine, in words."""
    problem = why_not_native(("tensor",))
    if problem is None:
        return "native"
    return f"emulated: {problem}"


@dataclass(frozen=True)
class Accelerator:
    """What a device's datasheet says of it.

    Attributes:
        name: As its maker calls it.
        bf16: Dense bf16 matrix FLOP/s, fp32 accumulation.
        fp8: Dense FP8 matrix FLOP/s.
        bandwidth: Of its memory, bytes/s.
        memory: Bytes.
        link: To the others of a node, bytes/s in one direction.
        network: To other nodes, bytes/s in one direction, of the systems that its maker sells or describes.
        source: Where each of these is published, and what was done to it.
        granularities: Of scales that its FP8 GEMMs take; as in `compute.recipe.Operand.granularity`.
    """

    name: str
    bf16: float
    fp8: float
    bandwidth: float
    memory: float
    link: float
    network: float
    source: str
    granularities: tuple[str, ...] = ("tensor", "row")


NODE_SIZE = 8  # devices of a node: NVIDIA's DGX and HGX boards, AMD's MI300X platform
_BLOCKS, _MX = ("block_1x128", "block_128x128"), ("mx_1x32",)

# Each figure is as its source prints it, times what makes it dense, of one device, in one direction, in bytes.
ACCELERATORS = {
    "h100": Accelerator(
        "H100 SXM",
        bf16=989.4e12,
        fp8=1978.9e12,
        bandwidth=3.35e12,
        memory=80e9,
        link=900e9 / 2,
        network=400e9 / 8,
        source=(
            "FLOP/s without sparsity: NVIDIA H100 Tensor Core GPU Architecture, white paper, table of H100 SXM5. Memory"
            " 80 GB, 3.35 TB/s, and NVLink 900 GB/s both ways: H100 datasheet. 400 Gb/s a GPU: DGX H100 user guide."
        ),
        granularities=("tensor", "row", *_BLOCKS),
    ),
    "h200": Accelerator(
        "H200 SXM",
        bf16=989.4e12,
        fp8=1978.9e12,
        bandwidth=4.8e12,
        memory=141e9,
        link=900e9 / 2,
        network=400e9 / 8,
        source=(
            "FLOP/s as H100 SXM5 (1,979 and 3,958 with sparsity), memory 141 GB, 4.8 TB/s, and NVLink 900 GB/s both"
            " ways: NVIDIA H200 datasheet. 400 Gb/s a GPU: DGX H200 user guide."
        ),
        granularities=("tensor", "row", *_BLOCKS),
    ),
    "b200": Accelerator(
        "B200",
        bf16=4500e12 / 2,
        fp8=9000e12 / 2,
        bandwidth=8.0e12,
        memory=180e9,
        link=1800e9 / 2,
        network=400e9 / 8,
        source=(
            "FLOP/s, half of those with sparsity, memory 8 TB/s, and NVLink 1.8 TB/s both ways: NVIDIA Blackwell"
            " architecture technical brief, table of HGX B200. 1,440 GB of eight, 400 Gb/s a GPU: DGX B200 datasheet."
        ),
        granularities=("tensor", "row", *_MX),
    ),
    "l40s": Accelerator(
        "L40S",
        bf16=362.05e12,
        fp8=733e12,
        bandwidth=0.864e12,
        memory=48e9,
        link=64e9 / 2,
        network=400e9 / 8 / 2,
        source=(
            "FLOP/s without sparsity, memory 48 GB, 864 GB/s, and PCIe 4 x16, 64 GB/s both ways: NVIDIA L40S datasheet."
            " A 400 Gb/s adapter for two: NVIDIA OVX L40S reference."
        ),
    ),
    "rtx4090": Accelerator(
        "GeForce RTX 4090",
        bf16=165.2e12,
        fp8=330.3e12,
        bandwidth=1.008e12,
        memory=24e9,
        link=64e9 / 2,
        network=100e9 / 8,
        source=(
            "FLOP/s without sparsity, fp32 accumulation, and memory 24 GB, 1,008 GB/s: NVIDIA Ada GPU Architecture,"
            " white paper, appendix A. PCIe 4 x16, 64 GB/s both ways. A network of 100 Gb/s is an assumption."
        ),
    ),
    "mi300x": Accelerator(
        "MI300X",
        bf16=1307.4e12,
        fp8=2614.9e12,
        bandwidth=5.3e12,
        memory=192e9,
        link=7 * 128e9 / 2,
        network=400e9 / 8,
        source=(
            "FLOP/s without sparsity, memory 192 GB, 5.3 TB/s, and seven Infinity Fabric links of 128 GB/s both ways:"
            " AMD Instinct MI300X data sheet. 400 Gb/s a GPU: AMD's Instinct cluster reference architecture."
        ),
    ),
}

_NAMES = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "AMD Instinct MI300X": "mi300x",
}


def accelerator(device: torch.device) -> Accelerator | None:
    """The datasheet of `device`; None if it is not one that is known by its full name.

    Variants of one chip have other peaks: an H100 on a PCIe card is not the "NVIDIA H100 80GB HBM3".
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return ACCELERATORS.get(_NAMES.get(name, ""))


def peak_memory(device: torch.device) -> int | None:
    """The most bytes of its memory that tensors have taken so far; None where there is none of its own."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
