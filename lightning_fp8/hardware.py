"""The only place that asks a device, a driver or an import what it can do."""

import functools

import torch


@functools.cache
def emulation_dtype(device_type: str) -> torch.dtype:
    """The dtype in which an emulated FP8 GEMM runs fastest on this kind of device.

    FP8 values are exact in bf16 and in fp32, and both accumulate in fp32, so the choice costs speed alone, not
    correctness: bf16 rounds the result once more before it is scaled. GPUs, and CPUs with matrix units for bf16
    (AMX), run bf16; a CPU without them runs fp32, which is about twice as fast there as bf16.

    Args:
        device_type: As in `torch.device.type`.
    """
    if device_type != "cpu":
        return torch.bfloat16
    has_matrix_unit = torch.cpu.get_capabilities().get("amx_bf16", False)
    return torch.bfloat16 if has_matrix_unit else torch.float32


def describe_device() -> str:
    """The device that training would use, in words."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} (sm_{major}{minor}), {torch.cuda.device_count()} of them"
    return f"CPU, {torch.get_num_threads()} threads"


def describe_fp8() -> str:
    """How FP8 GEMMs run on this machine, in words."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    return f"emulated, in {str(emulation_dtype(device_type)).removeprefix('torch.')} GEMMs"
