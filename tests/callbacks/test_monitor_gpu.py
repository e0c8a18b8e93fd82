"""On a GPU, torch itself tells when the host waits: nothing of the monitor does, but one reading; `pytest -m gpu`."""

import pytest
import torch

from lightning_fp8 import convert_linears
from lightning_fp8.callbacks.watch.decoders import decoder_places, measure_alignment, watch_decoder
from lightning_fp8.callbacks.watch.linears import linear_places, watch_linear
from lightning_fp8.callbacks.watch.tally import Tally
from lightning_fp8.compute import PRESETS
from lightning_fp8.models import Decoder
from tests.callbacks.monitored import SHAPE

pytestmark = pytest.mark.gpu


def measured(preset, device, sync="default"):
    torch.manual_seed(0)
    net = Decoder(SHAPE).to(torch.bfloat16).to(device)
    tokens = torch.randint(SHAPE.vocab_size, (4, 32), generator=torch.Generator().manual_seed(1)).to(device)
    convert_linears(net, preset, backend="emulated")
    modules = list(net.named_modules())
    finds = (linear_places, decoder_places)
    tally = Tally(dict(place for n, m in modules for find in finds for place in find(n, m)), torch.device(device))
    net(tokens, tokens).backward()  # what is made once
    torch.cuda.set_sync_debug_mode(sync)
    try:
        handles = [h for n, m in modules for watch in (watch_linear, watch_decoder) for h in watch(n, m, tally)]
        net(tokens, tokens).backward()
        for handle in handles:
            handle.remove()
        for name, module in modules:
            measure_alignment(name, module, tally)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return tally.read()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_sampled_batch_makes_the_host_wait_nowhere(preset):
    found, expected = measured(preset, "cuda", sync="error"), measured(preset, "cpu")
    assert found.keys() == expected.keys()
    for layer, roles in expected.items():
        for role in roles:
            # The pass itself differs by the rounding of bf16 GEMMs, gradients by more than inputs.
            assert found[layer][role].get("amax", 0) == pytest.approx(expected[layer][role].get("amax", 0), rel=0.1)


def test_a_wait_would_be_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones((), device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
