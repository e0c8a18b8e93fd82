"""What a GPU asks for: a step that does not wait for it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from toy_adamw import SHAPES, set_grads, trained

from lightning_fp8.optim import FP8AdamW, finite


class _HostReads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


ASKED = {
    "plain": {},
    "clipped": {"clip_update_rms": 1.0, "max_update": 2.0},
    "correction8": {"rounding": "correction8"},
    "kahan": {"rounding": "kahan"},
    "health": {"track_health": True},
    "e4m3": {"moments": "e4m3"},
    "coat": {"moments": "coat"},
    "fp8_lm": {"moments": "fp8_lm", "rounding": "scaled_fp16"},
    "tensor lr": {"lr": torch.tensor(0.01)},
}


@pytest.mark.parametrize("options", ASKED.values(), ids=ASKED)
def test_a_step_reads_nothing_from_the_device(options, monkeypatch):
    monkeypatch.setattr(finite, "_FREE_TO_READ", ())
    params, optimizer = trained([0], **options)
    set_grads(params, 1)
    with _HostReads() as reads:
        optimizer.step()
    assert reads.found == []
    with _HostReads() as reads:
        assert optimizer.skipped_steps == 0
    assert reads.found  # so that the count can fail


def test_a_step_on_a_fake_gpu():
    """Fake tensors raise at any host read, and at operations between devices."""
    with FakeTensorMode():
        params = {
            name: torch.nn.Parameter(torch.zeros(shape, device="cuda").bfloat16()) for name, shape in SHAPES.items()
        }
        optimizer = FP8AdamW(list(params.items()), track_health=True, clip_update_rms=1.0)
        for _ in range(2):
            for p in params.values():
                p.grad = torch.zeros_like(p)
            optimizer.step()
        state = optimizer.state[params["a.weight"]]
        assert {tensor.device.type for tensor in state.values()} == {"cuda"}
        assert {figure.device.type for figure in optimizer.health()} == {"cuda"}
