"""The rules of FP8 hardware: our checks beside torch's own, on fake CUDA tensors."""

import pytest
import torch
from scaled_mm_oracle import blocks, oracle
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_fp8.compute.gemm import fp8_gemm
from lightning_fp8.compute.gemm.rules import check_layout, check_product
from lightning_fp8.numerics import E4M3, E5M2, Quantized, quantize

E4, E5, E8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
KINDS = ("tensor", "row", "block_1x128", "block_128x128", "mx_1x32")


def column_major(rows, columns):
    return torch.empty(columns, rows, device="cuda").t()


def right(kind, m=64, k=256, n=128):
    """Arguments that a device accepts: a, b and their scales."""
    a = torch.empty(m, k, device="cuda", dtype=E4)
    b = torch.empty(n, k, device="cuda", dtype=E4).t()
    if kind == "tensor":
        scales = torch.empty((), device="cuda"), torch.empty((), device="cuda")
    elif kind == "row":
        scales = torch.empty(m, 1, device="cuda"), torch.empty(1, n, device="cuda")
    elif kind == "block_1x128":
        scales = column_major(m, blocks(k, 128)), column_major(n, blocks(k, 128))
    elif kind == "block_128x128":
        scales = column_major(m, blocks(k, 128)), column_major(blocks(k, 512) * 4, blocks(n, 128))
    else:
        sizes = [blocks(lines, 128) * 128 * blocks(k, 128) * 4 for lines in (m, n)]
        scales = tuple(torch.empty(size, device="cuda", dtype=E8) for size in sizes)
    return [a, b, *scales]


def replaced(index, make):
    """The right arguments of a kind, but for one that `make` spoils."""

    def spoil(kind):
        arguments = right(kind)
        arguments[index] = make(arguments[index])
        return arguments

    return spoil


def strided(t):
    return torch.empty(*t.shape, 2, device="cuda", dtype=t.dtype)[..., 0]


def apart(t):
    return torch.empty(t.shape[0], 2 * t.shape[1], device="cuda", dtype=t.dtype)[:, : t.shape[1]]


def shorter(t):
    return t[:-1] if t.shape[0] > 1 else t[:, :-1]


def row_major(t):
    return torch.empty(t.shape, device="cuda", dtype=t.dtype)


def refuses(check, *arguments):
    try:
        check(*arguments)
    except (ValueError, RuntimeError):
        return True
    return False


SCALED = KINDS[1:]
BOTH_REFUSE = {
    "K is no multiple of 16": (KINDS, lambda kind: right(kind, k=248)),
    "N is no multiple of 16": (KINDS, lambda kind: right(kind, n=120)),
    "b is row-major": (KINDS, replaced(1, row_major)),
    "a is column-major": (KINDS, replaced(0, lambda a: row_major(a.t()).t())),
    "a has gaps": (KINDS, replaced(0, strided)),
    "b has gaps": (KINDS, replaced(1, lambda b: strided(b.t()).t())),
    "scales of a are fp64": (KINDS, replaced(2, lambda s: row_major(s).to(torch.float64))),
    "scales of b are fp64": (KINDS, replaced(3, lambda s: row_major(s).to(torch.float64))),
    "a scale of a is missing": (SCALED, replaced(2, shorter)),
    "a scale of b is missing": (("row", "block_1x128", "mx_1x32"), replaced(3, shorter)),
    "one scale for all of a": (SCALED, replaced(2, lambda s: torch.empty(1, 1, device="cuda"))),
    "one scale for all of b": (SCALED, replaced(3, lambda s: torch.empty(1, 1, device="cuda"))),
    "scales of a have gaps": (("row", "mx_1x32"), replaced(2, strided)),
    "scales of b have gaps": (("row", "mx_1x32"), replaced(3, strided)),
    "MX scales are not padded": (("mx_1x32",), replaced(2, lambda s: torch.empty(64, 8, device="cuda", dtype=E8))),
}
ONLY_OURS_REFUSE = {
    "a has gaps between rows": (KINDS, replaced(0, apart)),
    "b has gaps between columns": (KINDS, replaced(1, lambda b: apart(b.t()).t())),
    "K differs": (KINDS, replaced(1, lambda b: torch.empty(128, 512, device="cuda", dtype=E4).t())),
    "scales of a are row-major": (("block_1x128", "block_128x128"), replaced(2, row_major)),
    "scales of b are row-major": (("block_1x128",), replaced(3, row_major)),
    "the one column of scales has a stride": (("row",), replaced(2, lambda s: s.as_strided(s.shape, (1, 80)))),
    "128x128 scales are not padded": (("block_128x128",), replaced(3, lambda s: column_major(2, 1))),
    "M is no multiple of 4": (("block_1x128", "block_128x128"), lambda kind: right(kind, m=130)),
    "MX scales are not flat": (("mx_1x32",), replaced(2, lambda s: s.view(128, 8))),
}


def cases(table):
    return [pytest.param(kind, make, id=f"{kind}: {what}") for what, (kinds, make) in table.items() for kind in kinds]


@pytest.mark.parametrize(("m", "k", "n"), [(64, 256, 128), (1, 16, 16), (130, 192, 48), (4, 640, 4096)])
@pytest.mark.parametrize("kind", KINDS)
def test_both_checks_accept_what_is_right(kind, m, k, n):
    with FakeTensorMode():
        arguments = right(kind, blocks(m, 4) * 4 if kind.startswith("block") else m, k, n)
        assert not refuses(check_layout, *arguments, kind)
        assert not refuses(oracle, *arguments, kind)


@pytest.mark.parametrize(("kind", "make"), cases(BOTH_REFUSE))
def test_both_checks_refuse_what_is_wrong(kind, make):
    with FakeTensorMode():
        arguments = make(kind)
        assert refuses(oracle, *arguments, kind)
        with pytest.raises(ValueError, match="FP8 GEMM: "):
            check_layout(*arguments, kind)


@pytest.mark.parametrize(("kind", "make"), cases(ONLY_OURS_REFUSE))
def test_our_check_refuses_also_what_torch_lets_pass(kind, make):
    with FakeTensorMode():
        arguments = make(kind)
        assert not refuses(oracle, *arguments, kind)  # else the case belongs into the other table
        with pytest.raises(ValueError, match="FP8 GEMM: "):
            check_layout(*arguments, kind)


def q(rows, columns, fmt=E4M3, tile=None):
    return quantize(torch.ones(rows, columns), fmt, tile=tile)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (q(16, 32), q(32, 16), None),
        (q(16, 40), q(40, 16), None),  # a ragged K is padded
        (q(7, 32, E5M2), q(32, 16), None),
        (q(16, 32), q(48, 16), "K must be the same"),
        (q(16, 32), q(32, 24), "N is 24"),
        (q(16, 32, E5M2), q(32, 16, E5M2), "both operands are e5m2"),
        (q(16, 32)._replace(codes=torch.ones(16, 32).bfloat16()), q(32, 16), "a is torch.bfloat16"),
        (q(16, 32), q(32, 16)._replace(codes=torch.ones(32, 16)), "b is torch.float32"),
        (q(16, 32, tile=(1, None)), q(32, 16), "one operand has a scale a tensor"),
        (q(16, 32, tile=(1, None)), q(32, 16, tile=(None, 1)), None),
        (q(16, 32, tile=(None, 1)), q(32, 16, tile=(None, 1)), "scales of a"),
        (q(16, 32, tile=(1, 128)), q(32, 16, tile=(1, 128)), "do not go together"),
        (q(16, 32, tile=(128, 128)), q(32, 16, tile=(128, 128)), "do not go together"),
        (q(16, 32, tile=(1, 128)), q(32, 16, tile=(32, 1)), "do not go together"),
        (q(16, 32)._replace(scale=torch.ones((), dtype=torch.float64)), q(32, 16), "fp32"),
        (q(16, 320, tile=(1, 128))._replace(scale=torch.ones(16, 2)), q(320, 16, tile=(128, 1)), r"\(16, 3\)"),
        (Quantized(q(2, 16).codes.view(1, 2, 16), torch.ones(())), q(16, 16), "do not fit"),
    ],
)
def test_operands_are_checked_before_any_backend(a, b, words):
    if words is None:
        check_product(a, b)
        assert fp8_gemm(a, b, torch.float32, "emulated").shape == (a.codes.shape[0], 16)
        return
    with pytest.raises(ValueError, match=f"FP8 GEMM: .*{words}"):
        fp8_gemm(a, b, torch.float32, "emulated")
