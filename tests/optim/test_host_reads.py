"""What a GPU asks for: a step that does not wait for it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from toy_adamw import SHAPES, set_grads, trained

from lightning_fp8 import hardware
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


class _Steps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.parameters = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.lightning_fp8.adamw.default:
            self.parameters.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def test_the_kernel_of_a_gpu_steps_all_matrices_at_once(monkeypatch):
    monkeypatch.setattr(hardware, "runs_kernels", lambda: True)
    with FakeTensorMode(), _Steps() as steps:
        params = [torch.nn.Parameter(torch.zeros(8, 64 + 2 * i, device="cuda").bfloat16()) for i in range(5)]
        params.append(torch.nn.Parameter(torch.zeros(100, device="cuda").bfloat16()))  # whose moments are fp32
        optimizer = FP8AdamW(params)
        optimizer.param_groups[0]["lr"] = torch.full((), 0.01, device="cuda")
        for _ in range(2):
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
    assert steps.parameters == [5, 5]


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
