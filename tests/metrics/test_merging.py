"""What all metrics do alike: ranks and batches merge exactly, states keep their dtype, nothing waits for a device."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import MetricCollection

from lightning_fp8 import metrics as m
from lightning_fp8.metrics.attention import attention_scores
from lightning_fp8.metrics.merged import Merged
from lightning_fp8.numerics import E4M3, quantize
from tests.ranks import spawn

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
K = 160


def tensor(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * 2.0 ** (-16 * torch.rand(*shape, generator=generator))


def with_cast(seed):
    x = tensor(48, K, seed=seed)
    return x, quantize(x, E4M3)


def of_one(seed):
    return (tensor(48, K, seed=seed),)


def of_pairs(seed):
    return tensor(48, K, seed=seed), tensor(48, K, seed=seed + 100)


def of_steps(seed):
    before = tensor(48, K, seed=seed).bfloat16()
    exact = before.float() * (1 + 2**-9)
    return before, exact, exact.bfloat16()


def of_attention(seed):
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    return attention_scores(tensor(2, 4, 6, 8, seed=seed), tensor(2, 2, 6, 8, seed=seed + 100)), seen


# What is merged exactly: the metric, and what it is updated with in a batch of this seed.
MERGED = {
    "amax": (m.Amax, of_one),
    "underflow": (m.UnderflowRate, with_cast),
    "saturation": (m.SaturationRate, with_cast),
    "sqnr": (m.SQNR, with_cast),
    "block_sqnr": (m.BlockSQNR, with_cast),
    "cosine": (m.CosineDistortion, with_cast),
    "lag": (m.ScaleLag, with_cast),
    "kurtosis": (lambda: m.ActivationKurtosis(K), of_one),
    "max_median": (m.MaxMedianRatio, of_one),
    "update_rms": (m.UpdateRMS, of_one),
    "max_update": (m.MaxUpdate, of_one),
    "stalled": (m.StalledUpdateFraction, of_steps),
    "moment_zeros": (m.MomentZeroFraction, of_pairs),
    "logit_max": (m.AttentionLogitMax, of_attention),
    "entropy": (m.AttentionEntropy, of_attention),
    "log_z": (m.OutputLogZ, of_one),
    "alignment": (m.SwiGLUAlignment, of_pairs),
    "sensitivity": (lambda: m.LRSensitivity(4.0), lambda seed: (torch.tensor(2 + math.sin(seed)),)),
}
# What follows a run: the same on all ranks, whose mean (largest, for the scale) it takes.
FOLLOWING = {
    "drift": (m.ScaleDrift, lambda seed: (torch.tensor(2.0**seed),)),
    "norm": (lambda: m.GradNormZ(warmup=2), lambda seed: (torch.tensor(2 + math.sin(seed)),)),
    "spike": (lambda: m.LossSpike(window=4), lambda seed: (torch.tensor(2 + math.sin(seed)),)),
    "gap": (lambda: m.LossGapToReference(torch.ones(9)), lambda seed: (torch.tensor(2 + math.sin(seed)), seed)),
}
ALL = {**MERGED, **FOLLOWING}


def computed(name, seeds):
    make, inputs = ALL[name]
    metric = make()
    for seed in seeds:
        metric.update(*inputs(seed))
    return metric


def test_every_metric_is_here():
    made = {type(make()).__name__ for make, _ in ALL.values()}
    assert made | {"Perplexity", "BitsPerByte", "lr_sensitivity"} == set(m.__all__)


def _on_two_ranks(folder: Path) -> None:
    rank = dist.get_rank()
    for name in MERGED:  # each rank has batches of its own, and not as many
        metric = computed(name, [0, 1, 2] if rank == 0 else [3])
        torch.testing.assert_close(metric.compute(), computed_alone(name, range(4)), rtol=1e-12, atol=0, msg=name)
    for name in FOLLOWING:
        metric = computed(name, range(6))
        torch.testing.assert_close(metric.compute(), computed_alone(name, range(6)), rtol=1e-12, atol=0, msg=name)


def computed_alone(name, seeds):
    metric = computed(name, seeds)
    metric.sync_on_compute = False
    return metric.compute()


def test_two_processes_have_the_figures_of_all_their_batches(tmp_path):
    spawn(_on_two_ranks, 2, tmp_path)


@pytest.mark.parametrize("name", ALL)
def test_a_metric_starts_anew_after_a_reset(name):
    metric = computed(name, range(3))
    expected = metric.compute()
    metric.reset()
    for seed in range(3):
        metric.update(*ALL[name][1](seed))
    torch.testing.assert_close(metric.compute(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ALL)
def test_states_keep_their_dtype_in_a_model_that_is_cast(name):
    holder = nn.Module()
    holder.metric = ALL[name][0]()
    holder.to(torch.bfloat16).half()
    for seed in range(3):
        holder.metric.update(*ALL[name][1](seed))
    torch.testing.assert_close(holder.metric.compute(), computed(name, range(3)).compute(), rtol=0, atol=0)


def test_metrics_of_a_cast_form_a_collection():
    """As users of torchmetrics would have it; equal states are computed once."""
    metrics = MetricCollection([m.SQNR(), m.UnderflowRate(), m.SaturationRate(), m.CosineDistortion()])
    for seed in range(3):
        metrics.update(*with_cast(seed))
    found = metrics.compute()
    assert set(found) == {"SQNR", "UnderflowRate", "SaturationRate", "CosineDistortion"}
    assert found["SQNR"] == computed("sqnr", range(3)).compute()


class Reads(TorchDispatchMode):
    """Notes operations whose result the host would wait for."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim"}:
            self.names.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in ALL if name != "gap"])
def test_an_update_reads_nothing_back(name):
    make, inputs = ALL[name]
    metric, batches = make(), [inputs(seed) for seed in range(2)]
    with Reads() as reads:
        for batch in batches:
            metric.update(*batch)
        metric.compute()
    assert reads.names == set()


@pytest.mark.parametrize("name", [name for name, (make, _) in MERGED.items() if issubclass(type(make()), Merged)])
def test_an_update_runs_on_tensors_without_values(name):
    """Where any dependence of the host on a value is an error; the tensors claim to be on a GPU."""
    make, inputs = ALL[name]
    kind, batch = type(make()), inputs(0)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: mode.from_tensor(t).to("cuda"), batch)
        with pytest.raises(DataDependentOutputException):
            float(torch.ones((), device="cuda"))
        if isinstance(make(), m.ScaleLag):
            found = kind.measure(fake[0].abs().amax(), fake[1].scale)
        elif name in ("underflow", "saturation", "sqnr", "block_sqnr", "cosine"):
            found = kind.measure(m.merged.Rounded.of(*fake))
        else:
            found = kind.measure(*fake)
        figure = kind.figure(found.expand(5, -1))
    assert figure.shape == (5,)
    assert figure.device.type == "cuda"
    assert found.dtype == torch.float64
