import logging

import pytest
import torch

from lightning_fp8 import hardware
from lightning_fp8.compute import PRESETS, convert_linears
from lightning_fp8.compute.gemm import record_gemms, select_backend

GRANULARITIES = ("tensor", "row", "block_1x128", "block_128x128", "mx_1x32")
ROWS = {"tensor", "row"}
BLOCKS = {"block_1x128", "block_128x128"}
DEVICES = {
    # (compute capability, CUDA): granularities that its FP8 GEMMs take
    ((8, 0), "12.8"): set(),
    ((8, 6), "13.0"): set(),
    ((8, 9), "12.8"): ROWS,
    ((9, 0), "12.8"): ROWS,
    ((9, 0), "12.9"): ROWS | BLOCKS,
    ((9, 0), "13.0"): ROWS | BLOCKS,
    ((10, 0), "12.9"): ROWS | {"mx_1x32"},
    ((12, 0), "13.0"): {"tensor", "mx_1x32"},
}


@pytest.fixture
def machine(monkeypatch):
    """Makes torch see a CUDA device that is not there; forgets what was decided before and afterwards."""

    def make(capability, cuda="12.9", hip=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "Testium 1000")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        select_backend.cache_clear()

    select_backend.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield make
    select_backend.cache_clear()


@pytest.mark.parametrize(("capability", "cuda", "can"), [(*device, can) for device, can in DEVICES.items()])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_each_device_is_known_for_what_it_can_multiply(capability, cuda, can, granularity, machine):
    machine(capability, cuda)
    problem = hardware.why_not_native([granularity])
    assert (problem is None) == (granularity in can)
    if problem:
        assert f"Testium 1000 (sm_{capability[0]}{capability[1]})" in problem
        assert "need" in problem


def test_one_granularity_that_cannot_is_enough(machine):
    machine((9, 0))
    assert hardware.why_not_native(["tensor", "row"]) is None
    assert "mx_1x32" in hardware.why_not_native(["tensor", "mx_1x32"])


def test_a_machine_without_a_device_and_one_by_amd_say_so(machine):
    assert hardware.why_not_native(["tensor"]) == "there is no CUDA device"
    machine((9, 4), cuda=None, hip="6.3")
    assert "AMD" in hardware.why_not_native(["tensor"])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("capability", "cuda"), DEVICES)
def test_auto_is_native_where_every_operand_of_the_recipe_can_be(capability, cuda, preset, machine):
    machine(capability, cuda)
    recipe = PRESETS[preset]
    used = {operand.granularity for operand in (recipe.input, recipe.weight, recipe.grad_output)}
    possible = used <= DEVICES[capability, cuda]
    assert select_backend("auto", recipe) == ("auto" if possible else "emulated")
    assert select_backend("emulated", recipe) == "emulated"
    if possible:
        assert select_backend("native", recipe) == "native"
    else:
        with pytest.raises(ValueError, match="native"):
            select_backend("native", recipe)


def test_asking_for_native_where_it_cannot_run_names_reason_and_remedy(machine):
    with pytest.raises(ValueError, match=r"there is no CUDA device.*'emulated'.*'auto'"):
        select_backend("native", PRESETS["tensorwise"])
    machine((8, 0))
    with pytest.raises(ValueError, match=r"sm_80.*sm_89.*'emulated'"):
        select_backend("native", PRESETS["tensorwise"])
    machine((9, 0), "12.8")
    with pytest.raises(ValueError, match=r"CUDA 12.9.*with CUDA 12.8.*'emulated'"):
        select_backend("native", PRESETS["blockwise"])


def test_an_unknown_backend_is_told_the_known_ones(machine):
    with pytest.raises(ValueError, match="'cuda' is not one of auto, native, emulated"):
        select_backend("cuda", PRESETS["tensorwise"])


def test_what_auto_chose_and_why_is_said_once(machine, caplog):
    caplog.set_level(logging.INFO, logger="lightning_fp8")
    for _ in range(3):
        select_backend("auto", PRESETS["tensorwise"])
    assert [record.message for record in caplog.records] == ["FP8 GEMMs are emulated: there is no CUDA device."]
    caplog.clear()
    machine((9, 0))
    for _ in range(3):
        select_backend("auto", PRESETS["tensorwise"])
    assert [record.message for record in caplog.records] == ["FP8 GEMMs are native on CUDA devices."]


def test_tensors_on_cpus_are_multiplied_there_even_beside_a_device(machine):
    machine((9, 0))
    layer = torch.nn.Linear(32, 16)
    convert_linears(layer)
    assert layer.fp8_backend == "auto"
    with record_gemms() as gemms:
        layer(torch.randn(16, 32))
    assert [gemm.backend for gemm in gemms] == ["emulated"]


def test_the_device_is_described_in_words(machine):
    assert hardware.describe_device().startswith("CPU, ")
    assert hardware.describe_fp8() == "emulated: there is no CUDA device"
    machine((9, 0))
    assert hardware.describe_device() == "Testium 1000 (sm_90), 2 of them"
    assert hardware.describe_fp8() == "native"
    machine((8, 0))
    assert "emulated: Testium 1000 (sm_80)" in hardware.describe_fp8()


@pytest.mark.parametrize(
    ("name", "known"),
    [("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA H200", "H200 SXM"), ("NVIDIA H100 PCIe", None), ("H200", None)],
)
def test_a_datasheet_goes_with_the_full_name_of_a_device(monkeypatch, name, known):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    found = hardware.accelerator(torch.device("cuda", 0))
    assert (found and found.name) == known
    assert hardware.peak_memory(torch.device("cuda", 0)) == 7


def test_a_cpu_has_no_datasheet_and_no_memory_of_its_own():
    assert hardware.accelerator(torch.device("cpu")) is None
    assert hardware.peak_memory(torch.device("cpu")) is None


@pytest.mark.parametrize("name", hardware.ACCELERATORS)
def test_every_figure_of_a_datasheet_names_its_source(name):
    device = hardware.ACCELERATORS[name]
    said = device.source.replace(",", "")
    of_the_box = 8 if name == "b200" else 1
    both_ways = device.link * 2 / (7 if name == "mi300x" else 1)  # links to seven others
    for rate in (device.bandwidth, both_ways):
        assert f"{rate / 1e12:g} TB/s" in said or f"{rate / 1e9:g} GB/s" in said, rate
    assert f"{of_the_box * device.memory / 1e9:g} GB" in said
    shared = 2 if name == "l40s" else 1
    assert f"{shared * device.network * 8 / 1e9:g} Gb/s" in said
    assert "parsity" in said or "half of those" in said
    assert sum(said.count(maker) for maker in ("NVIDIA", "AMD", "DGX")) >= 1
    assert 1.9 < device.fp8 / device.bf16 < 2.1
