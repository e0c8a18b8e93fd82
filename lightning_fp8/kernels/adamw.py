"""The step of `FP8AdamW` on one parameter with both moments in FP8, as one pass over its memory.

`optim/step.py` says what a step is, as torch operations, a few hundred of them: each goes through memory once more, and
on a CPU so does what `torch.compile` makes of them. Here is the same step as a kernel that keeps a block in registers
and caches: 10 bytes a parameter are read or written. What `optim/health.py` counts is counted on the way, if it is
asked for, and gradients are multiplied on the way, which saves clipping a pass of its own.

One kernel is for CPUs (`cpu/adamw.cpp`), where a C++ compiler is found; it takes parameters one by one, and its
results are those of the torch operations to the last bit. The other is for GPUs (`triton/adamw.py`), and takes a
parameter group in one launch; nothing that it needs is read by the host. It uses the hardware's approximations of roots
and logarithms, which move one code in some ten thousand to its neighbour.

`torch.ops.lightning_fp8.adamw` is the operator behind both, so that compiled graphs and fake tensors see a step of many
parameters as one.
"""

import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_fp8 import hardware
from lightning_fp8.kernels.cpu import build
from lightning_fp8.numerics.moments import FP8Moments, m_levels

_FLOATS = (torch.bfloat16, torch.float32)
_BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)  # that a tile of the Triton kernel can hold


class Group(NamedTuple):
    """The numbers that the parameters of a step have in common, as fp32 multiplies by them.

    `rest1` and `rest2` are 1 - beta; an update is at most `max_update`, None for no limit.
    """

    beta1: float
    rest1: float
    beta2: float
    rest2: float
    eps: float
    max_update: float | None


class Matrix(NamedTuple):
    """A parameter as a matrix, and where it lies in the whole parameter.

    Attributes:
        weight: bf16, which is rounded stochastically, or fp32; [R, C], contiguous as all else.
        grad: bf16 or fp32 [R, C].
        moments: Codes [R, C], numbers of blocks [R, ceil(C / block_size)].
        first_row: The first row's number in the whole parameter.
        first_column: Likewise.
        key: Of the random bits.
    """

    weight: Tensor
    grad: Tensor
    moments: FP8Moments
    first_row: int
    first_column: int
    key: tuple[int, int]


class Numbers(NamedTuple):
    """The numbers of a step of one parameter; all but `step` and the key become fp32.

    `shrink` is what weight decay multiplies the weight by, `grad_factor` what the gradient is multiplied by, `rest1`
    and `rest2` are 1 - beta, and the moments are multiplied by the corrections of their bias.
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
    grad_factor: float
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
        *((name, ctypes.c_float) for name in ("beta1", "rest1", "beta2", "rest2", "eps", "shrink", "lr")),
        *((name, ctypes.c_float) for name in ("grad_factor", "max_update", "m_correction", "v_correction")),
        *((name, ctypes.c_int32) for name in ("bf16_weight", "bf16_grad", "threads")),
        ("counts", ctypes.c_void_p),
    )


def has_adamw(weight: Tensor, grad: Tensor, block_size: int) -> bool:
    """Whether there is a kernel for weights and gradients like these: decided here and nowhere else."""
    if weight.dtype not in _FLOATS or grad.dtype not in _FLOATS or weight.device != grad.device:
        return False
    if weight.is_cuda:
        return block_size in _BLOCK_SIZES and hardware.runs_kernels()
    return weight.is_cpu and build.load("adamw") is not None


def adamw(
    matrices: Sequence[Matrix],
    steps: Tensor,
    numbers: Tensor,
    group: Group,
    block_size: int,
    finite: Tensor | None,
    counts: Tensor | None = None,
) -> None:
    """Steps parameters in place, where `has_adamw` says that it can be.

    Args:
        matrices: P parameters, on one device, the weights of one dtype, the gradients too.
        steps: int32 [P], the step counts, this step included.
        numbers: fp32 [P, 5]: the learning rate, what weight decay multiplies by, what the moments are multiplied by
            because they start at zero, and what the gradients are multiplied by.
        group: What they have in common.
        block_size: Elements of a block.
        finite: A bool scalar: where it is false, nothing changes. None is true.
        counts: fp32 [P, 6], zeros, to which the fields of `optim.health.Counts` are added, in their order.

    Raises:
        ValueError: A tensor is not contiguous, or there is no kernel.
    """
    tensors = [[m.weight for m in matrices], [m.grad for m in matrices]]
    tensors += [list(field) for field in zip(*(m.moments for m in matrices), strict=True)]
    if not all(tensor.is_contiguous() for some in tensors for tensor in some):
        raise ValueError("The AdamW kernel takes contiguous tensors; use the step of optim/step.py.")
    torch.ops.lightning_fp8.adamw(
        *tensors,
        steps,
        numbers,
        finite,
        counts,
        [m.first_row for m in matrices],
        [m.first_column for m in matrices],
        [half for m in matrices for half in m.key],
        list(group[:-1]),
        group.max_update,
        block_size,
    )


torch.library.define(
    "lightning_fp8::adamw",
    "(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] m_codes, Tensor(c!)[] m_scale, Tensor(d!)[] v_codes,"
    " Tensor(e!)[] v_max, Tensor(f!)[] v_density, Tensor(g!)[] v_split, Tensor(h!)[] v_gap, Tensor steps,"
    " Tensor numbers, Tensor? finite, Tensor(i!)? counts, int[] first_rows,"
    " int[] first_columns, int[] keys, float[] group, float? max_update, int block_size) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)


torch.library.register_fake("lightning_fp8::adamw", lambda *_: None)  # everything is written in place


@torch.library.impl("lightning_fp8::adamw", "cpu")
def _on_cpu(*arguments: Any) -> None:
    matrices, steps, numbers, group, block_size, finite, counts = _unpacked(*arguments)
    if finite is not None and not finite:
        return
    levels = m_levels(torch.device("cpu"))
    names = ("lr", "shrink", "m_correction", "v_correction", "grad_factor")
    for place, (matrix, step, own) in enumerate(zip(matrices, steps.tolist(), numbers.tolist(), strict=True)):
        rows = torch.arange(matrix.first_row, matrix.first_row + len(matrix.weight), dtype=torch.int32)
        limit = math.inf if group.max_update is None else group.max_update
        shared = group._replace(max_update=limit)._asdict()
        step_on_cpu(
            matrix.weight,
            matrix.grad,
            matrix.moments,
            levels,
            rows,
            matrix.first_column,
            block_size,
            Numbers(key=matrix.key, step=step, **dict(zip(names, own, strict=True)), **shared),
            None if counts is None else counts[place],
        )


@torch.library.impl("lightning_fp8::adamw", "cuda")
def _on_gpu(*arguments: Any) -> None:
    from lightning_fp8.kernels.triton.launch_adamw import launch

    with hardware.device_of(arguments[0][0]):
        launch(*_unpacked(*arguments))


def _unpacked(
    weights: list[Tensor],
    grads: list[Tensor],
    m_codes: list[Tensor],
    m_scale: list[Tensor],
    v_codes: list[Tensor],
    v_max: list[Tensor],
    v_density: list[Tensor],
    v_split: list[Tensor],
    v_gap: list[Tensor],
    steps: Tensor,
    numbers: Tensor,
    finite: Tensor | None,
    counts: Tensor | None,
    first_rows: list[int],
    first_columns: list[int],
    keys: list[int],
    group: list[float],
    max_update: float | None,
    block_size: int,
) -> tuple[list[Matrix], Tensor, Tensor, Group, int, Tensor | None, Tensor | None]:
    """The operator's arguments as those of `adamw`."""
    moments = map(FP8Moments, m_codes, m_scale, v_codes, v_max, v_density, v_split, v_gap)
    pairs = zip(keys[::2], keys[1::2], strict=True)
    matrices = list(map(Matrix, weights, grads, moments, first_rows, first_columns, pairs))
    return matrices, steps, numbers, Group._make((*group, max_update)), block_size, finite, counts


def step_on_cpu(
    weight: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, ...],
    m_levels: Tensor,
    whole_rows: Tensor,
    first_column: int,
    block_size: int,
    numbers: Numbers,
    counts: Tensor | None = None,
) -> None:
    """Steps one parameter in place with the C++ kernel.

    Args:
        weight: bf16, which is rounded stochastically, or fp32; [R, C], contiguous as all else.
        grad: bf16 or fp32 [R, C].
        moments: The fields of `FP8Moments`: codes [R, C], numbers of blocks [R, ceil(C / block_size)].
        m_levels: fp32 [256], what the codes of m stand for.
        whole_rows: int32 [R], the number of each row in the whole parameter, for the random bits.
        first_column: The first one's number in the whole parameter.
        block_size: Elements of a block.
        numbers: Of the step.
        counts: fp32 [6], to which this step's are added; see `adamw`.
    """
    library = build.load("adamw")
    tensors = [weight, grad, *moments, whole_rows, m_levels]
    checked = tensors if counts is None else [*tensors, counts]
    if library is None or not all(tensor.is_contiguous() for tensor in checked):
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
        counts=None if counts is None else counts.data_ptr(),
    )
    library.fp8_adamw(ctypes.byref(task))
