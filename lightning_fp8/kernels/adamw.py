"""The step of `FP8AdamW` on one parameter with both moments in FP8, as one pass over its memory.

`optim/step.py` says what a step is, as torch operations, a few hundred of them: each goes through memory once more, and
on a CPU so does what `torch.compile` makes of them. Here is the same step as a kernel that keeps a block in registers
and caches: 10 bytes a parameter are read or written. Its results are those of the torch operations to the last bit, so
whether there is a kernel changes the time only.

A kernel exists for CPUs (`cpu/adamw.cpp`), where a C++ compiler is found.
"""

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_fp8.kernels.cpu import build


class Numbers(NamedTuple):
    """The numbers of a step of one parameter; all but `step` and the key become fp32.

    `shrink` is what weight decay multiplies the weight by, `sign` -1 to maximise, `rest1` and `rest2` are 1 - beta, and
    the moments are multiplied by the corrections of their bias.
    """

    key: tuple[int, int]
    step: int
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    eps: float
    shrink: float
    lr: float
    sign: float
    m_correction: float
    v_correction: float
    max_update: float = math.inf


class _Task(ctypes.Structure):
    """`Task` of `cpu/adamw.cpp`."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("weight", "grad", "m_codes", "m_scale", "v_codes", "v_max", "v_density", "v_split", "v_gap")
        ),
        *((name, ctypes.c_void_p) for name in ("whole_rows", "m_levels")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "block_size")),
        *((name, ctypes.c_int32) for name in ("first_column", "key0", "key1", "step")),
        *((name, ctypes.c_float) for name in ("beta1", "rest1", "beta2", "rest2", "eps", "shrink", "lr", "sign")),
        *((name, ctypes.c_float) for name in ("max_update", "m_correction", "v_correction")),
        *((name, ctypes.c_int32) for name in ("bf16_weight", "bf16_grad", "threads")),
    )


def has_adamw(weight: Tensor, grad: Tensor) -> bool:
    """Whether there is a kernel for a weight and a gradient like these."""
    floats = (torch.bfloat16, torch.float32)
    fits = weight.dtype in floats and grad.dtype in floats and weight.device.type == grad.device.type == "cpu"
    return fits and build.load("adamw") is not None


def adamw(
    weight: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, ...],
    m_levels: Tensor,
    whole_rows: Tensor,
    first_column: int,
    block_size: int,
    numbers: Numbers,
) -> None:
    """Steps one parameter in place, where `has_adamw` says that it can be.

    Args:
        weight: bf16, which is rounded stochastically, or fp32; [R, C], contiguous as all else.
        grad: bf16 or fp32 [R, C].
        moments: The fields of `FP8Moments`: codes [R, C], numbers of blocks [R, ceil(C / block_size)].
        m_levels: fp32 [256], what the codes of m stand for.
        whole_rows: int32 [R], the number of each row in the whole parameter, for the random bits.
        first_column: The first one's number in the whole parameter.
        block_size: Elements of a block.
        numbers: Of the step.
    """
    library = build.load("adamw")
    tensors = [weight, grad, *moments, whole_rows, m_levels]
    if library is None or not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("The AdamW kernel takes contiguous tensors, and a compiler; use the step of optim/step.py.")
    names = [name for name, *_ in _Task._fields_]
    task = _Task(
        **dict(zip(names, [tensor.data_ptr() for tensor in tensors], strict=False)),
        rows=weight.shape[0],
        columns=weight.shape[1],
        block_size=block_size,
        first_column=first_column,
        key0=numbers.key[0],
        key1=numbers.key[1],
        **{name: value for name, value in numbers._asdict().items() if name != "key"},
        bf16_weight=weight.dtype is torch.bfloat16,
        bf16_grad=grad.dtype is torch.bfloat16,
        threads=torch.get_num_threads(),
    )
    library.fp8_adamw(ctypes.byref(task))
