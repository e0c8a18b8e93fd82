"""Which FP8 GEMMs Transformer Engine ran, told by its layers: torch's dispatcher, and what counts there, sees none."""

from typing import Any

import torch
from torch import Tensor

from lightning_fp8.compute.gemm import GemmRecord, note_gemm
from lightning_fp8.compute.recipe import Recipe

BACKEND = "transformer_engine"


def note_gemms(recipe: Recipe, x: Tensor, weight: Tensor, y: Tensor) -> None:
    """Notes the GEMM of y [..., N] = x [..., K] w [N, K]^T and, once backward reaches `y`, those of the gradients."""
    (n, k), e4m3, dy = weight.shape, torch.float8_e4m3fn, recipe.grad_output.number_format.dtype
    m = x.numel() // k
    wants_dx, wants_dw = x.requires_grad, weight.requires_grad
    note_gemm(GemmRecord(m, k, n, e4m3, e4m3, BACKEND))

    def backward(_: Any) -> None:
        if wants_dx:
            note_gemm(GemmRecord(m, n, k, dy, e4m3, BACKEND))
        if wants_dw:
            note_gemm(GemmRecord(n, m, k, dy, e4m3, BACKEND))

    if y.requires_grad:
        y.register_hook(backward)
