"""The overlays of `configs/model/`, built without memory and counted; that `fit` reads them is in test_configs."""

from pathlib import Path

import pytest
import torch
import yaml

from lightning_fp8.models import Decoder
from lightning_fp8.models.config import config_from_dict

CONFIGS = Path(__file__).parent.parent / "configs"
MODELS = {path.stem: path for path in (CONFIGS / "model").glob("*.yaml")}
# Parameters, tied embeddings counted once: as published with the weights. The first four are ours.
PARAMETERS = {
    "10m": 9_770_880,
    "50m": 50_867_968,
    "125m": 121_527_808,
    "350m": 360_767_744,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen-2.5-0.5b": 494_032_768,
    "qwen-2.5-1.5b": 1_543_714_304,
    "qwen-2.5-3b": 3_085_938_688,
    "qwen-2.5-7b": 7_615_616_512,
    "qwen-2.5-14b": 14_770_033_664,
    "qwen-2.5-32b": 32_763_876_352,
    "qwen-2.5-72b": 72_706_203_648,
    "qwen-3-0.6b": 596_049_920,
    "qwen-3-1.7b": 1_720_574_976,
    "qwen-3-4b": 4_022_468_096,
    "qwen-3-8b": 8_190_735_360,
    "qwen-3-14b": 14_768_307_200,
    "qwen-3-32b": 32_762_123_264,
    "mistral-7b": 7_241_732_096,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "mistral-large-123b": 122_610_069_504,
}


def test_every_model_is_counted() -> None:
    assert set(MODELS) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_published(name: str) -> None:
    config = config_from_dict(yaml.safe_load(MODELS[name].read_text())["model"]["config"])
    with torch.device("meta"):
        decoder = Decoder(config)
    assert sum(p.numel() for p in decoder.parameters()) == PARAMETERS[name]
