"""What a monitor must not do: change the run, wait for the device, leave anything behind."""

import math
from collections import Counter

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_fp8 import FP8Precision
from lightning_fp8.callbacks import FP8Monitor, RunLog
from lightning_fp8.callbacks.watch import table
from tests.callbacks.monitored import LAYERS, fit, health_tracked, listening, model

PRESETS = ["tensorwise", "delayed", "rowwise", "rowwise_gw_hp", "blockwise", "mxfp8"]
HOST_READS = {"tolist", "item", "__bool__", "__float__", "__int__", "cpu", "numpy", "nonzero", "equal", "__index__"}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than these runs; `test_monitor_settings.py` has a run that draws."""
    for name in ("draw_heat_map", "draw_layers"):
        monkeypatch.setattr(f"lightning_fp8.callbacks.monitor.{name}", lambda readings, path: None)


def hooks(module):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(part, kind)) for part in module.modules() for kind in kinds)


def leaves(trainer):
    """All tensors that a run leaves: weights, moments, scales."""
    states = [trainer.model.state_dict(), trainer.optimizers[0].state_dict(), trainer.precision_plugin.state_dict()]
    return [leaf for leaf in torch.utils._pytree.tree_leaves(states) if isinstance(leaf, torch.Tensor)]


VARIANTS = {
    **{preset: {"recipe": preset} for preset in PRESETS},
    "accumulation": {"accumulate_grad_batches": 2},
    "fp32 weights": {"plugins": "fp32"},
    "recomputed": {"activation_checkpointing": "full"},
    "partly recomputed": {"activation_checkpointing": "selective"},
    "released": {"gradient_release": True},
}


def run(folder, data, variant, *callbacks, **more):
    options = {**VARIANTS[variant], **more}
    if options.get("plugins") == "fp32":
        options["plugins"] = [FP8Precision(weights="fp32")]
    names = [name for name in ("activation_checkpointing", "gradient_release") if name in options]
    module = model(optimizer=health_tracked, **{name: options.pop(name) for name in names})
    return fit(folder, data, *callbacks, module=module, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_is_measured_and_the_run_is_the_unmonitored_one_bit_for_bit(prepared, tmp_path, variant):
    monitor, readings = listening()
    alone = leaves(run(tmp_path / "alone", prepared, variant))
    watched = leaves(run(tmp_path / "watched", prepared, variant, monitor))
    assert len(alone) == len(watched) > 30
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))
    assert [reading.step for reading in readings] == [1, 2, 3, 4]
    for reading in readings:
        assert {layer for layer, roles in reading.values.items() if "input" in roles} == set(LAYERS)
        for layer in LAYERS:
            assert list(reading.values[layer]) == ["input", "weight", "grad_output", "update"]
            for role in ("input", "weight", "grad_output"):
                figures = reading.values[layer][role]
                assert figures["amax"] > 0
                assert 0 <= figures["underflow"] < 1
                assert figures["saturation"] == 0 or variant == "delayed"
    names = {metric for reading in readings for *_, metric, _ in reading.figures()}
    assert names == set(table.METRICS)


class Calls(TorchFunctionMode):
    """Counts calls that bring a value to the host."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in HOST_READS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Counting(Callback):
    """Counts the operations of each batch, and the hooks that are on while it runs, and after its backward pass."""

    def __init__(self):
        self.operations, self.hooks, self.left, self.mode = [], [], [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.hooks.append(hooks(pl_module))
        self.mode = Operations()
        self.mode.__enter__()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.left.append(hooks(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.mode.__exit__(None, None, None)
        self.operations.append(self.mode.counts)


@pytest.mark.parametrize(("every", "read_every", "steps"), [(1, 1, 6), (2, 2, 6), (1, 3, 6), (2, 6, 6)])
def test_the_host_reads_once_a_reading(prepared, tmp_path, every, read_every, steps):
    def reads(*callbacks):
        with Calls() as calls:
            fit(tmp_path, prepared, *callbacks, steps=steps, module=model(optimizer=health_tracked))
        return calls.counts

    alone = reads()
    monitor, readings = listening(every_n_steps=every, read_every_n_steps=read_every)
    watched = reads(monitor)
    watched.subtract(alone)
    assert len(readings) == steps // read_every
    assert {name: n for name, n in watched.items() if n} == {"tolist": len(readings)}


def test_the_calls_that_are_counted_are_seen():
    with Calls() as calls:
        float(torch.ones(2).sum()), torch.ones(2).tolist(), bool(torch.ones(()))
    assert calls.counts == {"__float__": 1, "tolist": 1, "__bool__": 1}


def test_steps_between_samples_have_no_hooks_and_no_operation_more(prepared, tmp_path):
    alone, watched = Counting(), Counting()
    fit(tmp_path, prepared, steps=1)  # the first run of a process makes tables of constants
    fit(tmp_path, prepared, alone, steps=6)
    monitor, readings = listening(every_n_steps=3)
    fit(tmp_path, prepared, monitor, watched, steps=6)
    assert [n > 0 for n in watched.hooks] == [False, False, True] * 2
    assert watched.left == [0] * 6
    for step, (a, b) in enumerate(zip(alone.operations, watched.operations, strict=True), 1):
        assert (a == b) == (step % 3 != 0), step
    sampled = watched.operations[2]
    assert not {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"} & (sampled - alone.operations[2]).keys()
    assert len(readings) == 2


class Failing(Callback):
    """Fails in a batch that is being measured."""

    def on_before_backward(self, trainer, pl_module, loss):
        raise RuntimeError("as asked")


def test_no_hook_stays_after_a_run_or_a_failure(prepared, tmp_path):
    monitor, _ = listening()
    module = model()
    fit(tmp_path, prepared, monitor, module=module)
    assert hooks(module) == 0
    module = model()
    with pytest.raises(RuntimeError, match="as asked"):
        fit(tmp_path, prepared, FP8Monitor(every_n_steps=1), Failing(), module=module)
    assert hooks(module) == 0


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"every_n_steps": 4, "read_every_n_steps": 6}])
def test_intervals_that_do_not_fit_are_refused(options):
    with pytest.raises(ValueError, match="must be a multiple of the second"):
        FP8Monitor(**{"every_n_steps": 4, **options})


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3]), (9, [])])
def test_readings_are_at_multiples_of_the_interval(prepared, tmp_path, every, expected):
    monitor, readings = listening(every_n_steps=every)
    fit(tmp_path, prepared, monitor)
    assert [reading.step for reading in readings] == expected
    assert [reading.step for reading in table.read(tmp_path)] == expected


def test_a_longer_interval_has_the_figures_of_all_its_samples(prepared, tmp_path):
    each, singles = listening()
    both, pairs = listening(read_every_n_steps=2)
    fit(tmp_path / "each", prepared, each, steps=2)
    fit(tmp_path / "both", prepared, both, steps=2)
    (pair,) = pairs
    for layer in LAYERS:
        for role in ("input", "weight", "grad_output"):
            one, two = (reading.values[layer][role] for reading in singles)
            found = pair.values[layer][role]
            assert found["amax"] == max(one["amax"], two["amax"])
            for metric in ("underflow", "sqnr"):
                low, high = sorted((one[metric], two[metric]))
                assert low <= found[metric] <= high


def test_accumulation_is_sampled_once_a_step(prepared, tmp_path):
    counting = Counting()
    monitor, readings = listening(every_n_steps=2)
    fit(tmp_path, prepared, monitor, counting, steps=4, accumulate_grad_batches=3)
    assert [n > 0 for n in counting.hooks] == [False] * 3 + [True, False, False] + [False] * 3 + [True, False, False]
    assert [reading.step for reading in readings] == [2, 4]


class Save(Callback):
    """Saves a checkpoint after four steps."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/last.ckpt")


def test_a_resumed_run_has_the_readings_of_one_that_was_not_stopped(prepared, tmp_path):
    """Scale drift too, which is from one reading to the next; rows after the checkpoint are dropped."""
    straight, folder = tmp_path / "straight", tmp_path / "resumed"
    fit(straight, prepared, FP8Monitor(every_n_steps=2), Save(), steps=8)
    lines = (straight / table.NAME).read_text().splitlines()
    early = [line for line in lines if line.startswith(("step", "2,", "4,"))]
    late = [line.replace("4,", "6,", 1) for line in early if line.startswith("4,")]
    folder.mkdir()
    (folder / table.NAME).write_text("\n".join([*early, *late]) + "\n6,cut")
    fit(folder, prepared, FP8Monitor(every_n_steps=2), steps=8, ckpt_path=straight / "last.ckpt")
    expected, found = table.read(straight), table.read(folder)
    assert [reading.step for reading in found] == [2, 4, 6, 8]
    differing = [
        (a, b)
        for one, other in zip(expected, found, strict=True)
        for a, b in zip(one.figures(), other.figures(), strict=True)
        if a != b and not (math.isnan(a.value) and math.isnan(b.value))
    ]
    assert differing[:3] == []
    drifts = [figure.value for figure in found[2].figures() if figure.metric == "scale_drift"]
    assert any(drift > 0 for drift in drifts)


class Kept(DummyLogger):
    """Any other logger: keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.logged = {}

    def log_metrics(self, metrics, step=None):
        self.logged.setdefault(step, {}).update(metrics)


def test_run_log_has_the_worst_layers_and_other_loggers_all(prepared, tmp_path, monkeypatch):
    run_log, other = RunLog(str(tmp_path)), Kept()
    monitor, readings = listening()
    fit(tmp_path, prepared, monitor, logger=[run_log, other], steps=2)
    columns = {name for row in run_log.rows() for name in row}
    assert len(columns) < 40
    for row, reading in zip((r for r in run_log.rows() if r["fp8/worst/input/underflow"]), readings, strict=True):
        assert int(row["step"]) == reading.step - 1
        assert float(row["fp8/worst/input/underflow"]) == max(reading.values[n]["input"]["underflow"] for n in LAYERS)
        assert float(row["fp8/worst/weight/sqnr"]) == min(reading.values[n]["weight"]["sqnr"] for n in LAYERS)
    for reading in readings:
        every = {f"fp8/{f.layer}/{f.role}/{f.metric}": f.value for f in reading.figures()}
        assert every.items() <= other.logged[reading.step - 1].items()
