"""What the plugin refuses or warns about: one line that names the remedy."""

import warnings

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import FSDPStrategy as FabricFSDP
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import FSDPStrategy
from small_models import QUIET, Regression, batches, trainer
from torch import nn

from lightning_fp8 import FabricFP8Precision, FP8Precision
from lightning_fp8.optim import FP8AdamW

OPTIMIZERS = {"fp32": torch.optim.AdamW, "bf16": FP8AdamW}


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def fabric_setup(net, optimizer, **options):
    return Fabric(accelerator="cpu", devices=1, plugins=[FabricFP8Precision(**options)]).setup(net, optimizer)


def stray(*_, **__):
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)


def partly_stray(parameters, lr):
    return torch.optim.SGD([*parameters, nn.Parameter(torch.ones(2))], lr)


@pytest.mark.parametrize("optimizer", [stray, partly_stray])
def test_an_optimizer_of_other_parameters_is_refused(tmp_path, optimizer):
    with pytest.raises(ValueError, match=r"SGD holds parameters that are not.*configure_optimizers") as error:
        trainer(tmp_path, FP8Precision()).fit(Regression(optimizer), batches())
    one_line(error)


def test_fabric_refuses_an_optimizer_of_another_model_at_its_first_step():
    net, optimizer = fabric_setup(nn.Linear(16, 16), stray())
    net(torch.ones(16, 16)).sum().backward()
    with pytest.raises(ValueError, match=r"SGD holds no parameter of a model that was set up.*fabric\.setup") as error:
        optimizer.step()
    one_line(error)


def test_fabric_lets_an_optimizer_train_more_than_the_model():
    net, temperature = nn.Linear(16, 16), nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([*net.parameters(), temperature], lr=0.1)
    net, optimizer = fabric_setup(net, optimizer)
    (net(torch.ones(16, 16)).sum() * temperature).backward()
    optimizer.step()
    assert temperature.item() != 1


def test_rounding_bf16_weights_to_nearest_is_warned_about(tmp_path):
    with pytest.warns(UserWarning, match=r"AdamW rounds them to nearest.*FP8AdamW.*weights=\"fp32\"") as caught:
        trainer(tmp_path, FP8Precision(weights="bf16")).fit(Regression(), batches())
    assert sum("rounds them to nearest" in str(warning.message) for warning in caught) == 1


def test_fabric_warns_of_rounding_to_nearest_once():
    net = nn.Linear(16, 16)
    net, optimizer = fabric_setup(net, torch.optim.AdamW(net.parameters()), weights="bf16")
    net(torch.ones(16, 16)).sum().backward()
    with pytest.warns(UserWarning, match=r"AdamW rounds them to nearest.*FP8AdamW.*weights=\"fp32\""):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize("weights", OPTIMIZERS)
def test_safe_combinations_are_not_warned_about(tmp_path, weights):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rounds them to nearest.*")
        trainer(tmp_path, FP8Precision(weights=weights)).fit(Regression(OPTIMIZERS[weights]), batches())
        net = nn.Linear(16, 16)
        net, optimizer = fabric_setup(net, OPTIMIZERS[weights](net.parameters()), weights=weights)
        net(torch.ones(16, 16)).sum().backward()
        optimizer.step()


def test_a_model_without_a_convertible_layer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"BoringModel has no linear layer.*layer: sizes 32 x 2.*Remove") as error:
        trainer(tmp_path, FP8Precision()).fit(BoringModel())
    one_line(error)
    with pytest.raises(ValueError, match=r"it has no torch\.nn\.Linear"):
        FabricFP8Precision().convert_module(nn.Conv2d(3, 3, 3))


def test_the_trainer_can_keep_slow_layers_out(tmp_path):
    with pytest.raises(ValueError, match=r"32 x 64 are slower in FP8"):
        trainer(tmp_path, FP8Precision(keep_slow=True)).fit(Regression(), batches())


def test_activations_are_kept_in_fp8_where_asked_for(tmp_path):
    model = Regression()
    kinds = {name: type(module) for name, module in model.named_modules()}
    plugin = FP8Precision(fp8_activations=["net"])
    trainer(tmp_path, plugin).fit(model, batches())
    changed = {name for name, module in model.named_modules() if type(module).__bases__[-1] is kinds[name]}
    assert "net" in changed
    with pytest.raises(ValueError, match=r"no module's name matches 'nett'"):
        trainer(tmp_path, FP8Precision(fp8_activations=["nett"])).fit(Regression(), batches())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipe": "tensorwize"}, ("'tensorwize'", "'tensorwise'")),
        ({"recipe": {"scalling": "delayed"}}, ("'scalling'", "'scaling'")),
        ({"backend": "cuda"}, ("'cuda'", "emulated")),
        ({"weights": "fp16"}, ("weights 'fp16'", "fp32, bf16")),
        ({"eval_precision": "fp32"}, ("eval_precision 'fp32'", "fp8, bf16")),
        ({"bf16_first_steps": -1}, ("bf16_first_steps -1", "0 or")),
    ],
    ids=str,
)
@pytest.mark.parametrize("plugin", [FP8Precision, FabricFP8Precision])
def test_a_wrong_argument_is_named(plugin, options, words):
    with pytest.raises(ValueError, match="FP8") as error:
        plugin(**options)
    assert all(word in one_line(error) for word in words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="native GEMMs may well run here")
def test_a_backend_that_cannot_run_here_is_refused():
    with pytest.raises(ValueError, match=r"'native' cannot run here: there is no CUDA device. Use 'emulated'") as error:
        FP8Precision(backend="native")
    one_line(error)


def test_precision_and_the_plugin_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Choose one"):
        trainer(tmp_path, FP8Precision(), precision="bf16-mixed")


def test_fsdp1_is_refused_in_favour_of_its_successor():
    said = r"FSDPPrecision.*found .*sharded by ModelParallelStrategy"
    with pytest.raises(TypeError, match=said):
        FSDPStrategy(precision_plugin=FP8Precision())
    strategy = FabricFSDP()
    with pytest.raises(TypeError, match=said):
        strategy.precision = FabricFP8Precision()  # as Fabric does


def test_the_plugin_goes_in_as_an_instance_or_in_a_list():
    for plugins in (FP8Precision(), [FP8Precision()]):
        assert isinstance(Trainer(plugins=plugins, **QUIET).precision_plugin, FP8Precision)
