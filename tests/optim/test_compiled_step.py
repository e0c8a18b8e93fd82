"""The compiled step: one graph, and the eager step's bits."""

import pytest
import torch
from toy_adamw import assert_same_bits, bits_of, parameters, set_grads

from lightning_fp8.optim import FP8AdamW, packing


def compiled_graphs(backend, monkeypatch, **options):
    """Trains with a compiled step and returns what came of it and the number of its graphs."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, example)

    step = torch.compile(packing.step_rows, backend=count, dynamic=True, fullgraph=True)
    monkeypatch.setattr(packing, "_compiled_step", lambda *_: step)
    monkeypatch.setattr(packing, "has_adamw", lambda *_: False)  # which steps without a graph
    params = parameters()
    optimizer = FP8AdamW([(name, params[name]) for name in ("a.weight", "b.weight")], compile=True, **options)
    for step_number in range(4):
        set_grads(params, step_number)
        for group in optimizer.param_groups:
            group["lr"], group["betas"] = 0.01 / (1 + step_number), (0.9, 0.95 + step_number / 100)
            group["params"][-1].grad = None if step_number == 2 else group["params"][-1].grad  # other shapes
        optimizer.step()
    return bits_of({name: params[name] for name in ("a.weight", "b.weight")}, optimizer), len(graphs)


@pytest.mark.slow
def test_one_graph_whatever_changes_between_steps(monkeypatch):
    assert compiled_graphs("eager", monkeypatch)[1] == 1


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["stochastic", "correction8"])
def test_a_compiled_step_is_the_eager_one(rounding, monkeypatch):
    compiled, graphs = compiled_graphs("inductor", monkeypatch, rounding=rounding)
    assert graphs <= 2  # the compiler may tell small shapes from large ones
    assert_same_bits(compiled, compiled_graphs("eager", monkeypatch, rounding=rounding)[0])


def test_many_formats_in_one_process_do_not_exceed_the_limit_of_graphs(monkeypatch):
    """Formats, options and dtypes each have graphs of their own; dynamo's limit is of those of one function."""
    torch._dynamo.reset()
    packing._compiled_step.cache_clear()
    compile_ = torch.compile
    monkeypatch.setattr(packing.torch, "compile", lambda f, **options: compile_(f, backend="eager", **options))
    monkeypatch.setattr(packing, "has_adamw", lambda *_: False)
    with torch._dynamo.config.patch(recompile_limit=2):
        for moments in ("fp8", "e4m3", "bf16"):
            for dtype in (torch.bfloat16, torch.float32):
                p = torch.nn.Parameter(torch.randn(4, 128).to(dtype))
                p.grad = torch.ones_like(p)
                FP8AdamW([p], moments=moments, betas=(0.9, 0.9), compile=True).step()
    packing._compiled_step.cache_clear()
