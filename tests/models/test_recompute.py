import threading

import pytest
import torch
from peak_memory import peak_bytes
from torch import Tensor

from lightning_fp8 import convert_linears, fp8_autocast
from lightning_fp8.models import Decoder, DecoderConfig
from lightning_fp8.models.recompute import recomputing

CONFIG = DecoderConfig(vocab_size=64, hidden_size=64, num_layers=4, num_heads=2, num_kv_heads=1, intermediate_size=128)
TOKENS = torch.randint(64, (4, 65), generator=torch.Generator().manual_seed(0))


def decoder_of(how: str, fp8: bool = False) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(CONFIG, activation_checkpointing=how)
    if fp8:
        convert_linears(decoder)
    return decoder


def gradients(decoder: Decoder) -> list[Tensor]:
    decoder(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    return [p.grad for p in decoder.parameters()]


@pytest.mark.parametrize("fp8", [False, True], ids=["fp32", "fp8"])
@pytest.mark.parametrize("how", ["selective", "full"])
def test_gradients_are_bit_for_bit_the_same(how: str, fp8: bool) -> None:
    for a, b in zip(gradients(decoder_of(how, fp8)), gradients(decoder_of("none", fp8)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("how", ["selective", "full"])
def test_backward_computes_again_as_forward_did(how: str) -> None:
    """FP8 off in forward is off in the second run too, also on another thread, as backward has on GPUs."""
    plain, again = decoder_of("none", fp8=True), decoder_of(how, fp8=True)
    with fp8_autocast(enabled=False):
        losses = [decoder(TOKENS[:, :-1], TOKENS[:, 1:]) for decoder in (plain, again)]
    for loss in losses:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("fp8", [False, True], ids=["fp32", "fp8"])
def test_memory_falls(fp8: bool) -> None:
    peaks = {}
    for how in ("none", "selective", "full"):
        decoder = decoder_of(how, fp8)
        gradients(decoder)  # so that gradients exist
        peaks[how] = peak_bytes(lambda decoder=decoder: gradients(decoder))
    print(peaks)
    assert peaks["full"] < 0.5 * peaks["none"]
    assert peaks["full"] < peaks["selective"] < peaks["none"]


def test_nothing_is_kept_or_wrapped_without_gradients() -> None:
    def function(x: Tensor) -> Tensor:
        return x

    with torch.no_grad():
        assert recomputing(function, "full") is function
    assert recomputing(function, "none") is function


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="activation_checkpointing 'some' is not one of none, selective, full"):
        decoder_of("some")(TOKENS)
