"""The monitor in DDP, in a compiled model, and from the command line."""

import html.parser
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback

from lightning_fp8.callbacks import FP8Monitor, RunLog
from lightning_fp8.callbacks.watch import table
from lightning_fp8.cli.main import main
from tests.callbacks.monitored import LAYERS, fit, health_tracked, listening, model, readings_of
from tests.ranks import spawn

CONFIGS = Path(__file__).parents[2] / "configs"


def _on_two_ranks(folder: Path, data: Path) -> None:
    monitor, readings = listening(every_n_steps=2)
    amaxes = []

    class Watch(Callback):
        """Notes the largest input of one layer on this rank."""

        def on_train_start(self, trainer, pl_module):
            layer = pl_module.get_submodule(LAYERS[-1])
            layer.register_forward_pre_hook(lambda _, args: amaxes.append(float(args[0].abs().max())))

    options = {"strategy": "ddp", "devices": 2}
    trainer = fit(folder / "run", data, Watch(), monitor, module=model(optimizer=health_tracked), **options)
    assert trainer.world_size == 2
    assert [reading.step for reading in readings] == [2, 4]
    both, largest = [None, None], [None, None]
    dist.all_gather_object(both, readings)
    dist.all_gather_object(largest, amaxes)
    assert both[0] == both[1] == readings
    assert largest[0] != largest[1]  # ranks have seen different data
    for reading in readings:
        found = reading.values[LAYERS[-1]]["input"]["amax"]
        assert found == max(amaxes[reading.step - 1] for amaxes in largest)


def test_ranks_have_the_same_readings_of_the_data_of_both(prepared, tmp_path):
    spawn(_on_two_ranks, 2, tmp_path, prepared)
    assert [reading.step for reading in table.read(tmp_path / "run")] == [2, 4]


@pytest.mark.parametrize("part", [pytest.param(False, marks=pytest.mark.slow), True], ids=["module", "decoder"])
def test_a_compiled_model_is_measured_in_steps_that_run_eagerly(prepared, tmp_path, part):
    graphs = []

    def backend(graph, inputs):
        def count(*args):
            graphs.append(1)
            return graph.forward(*args)

        return count

    torch._dynamo.reset()
    module = model()
    module.configure_model()
    if part:
        module.decoder.compile(backend=backend)
    else:
        module = torch.compile(module, backend=backend)
    runs = []

    class Runs(Callback):
        def on_train_batch_end(self, *args):
            runs.append(len(graphs))
            graphs.clear()

    monitor, readings = listening(every_n_steps=2)
    fit(tmp_path, prepared, monitor, Runs(), module=module)
    assert [n > 0 for n in runs] == [True, False, True, False]
    assert [reading.step for reading in readings] == [2, 4]
    assert set(LAYERS) < set(readings[0].values)
    torch._dynamo.reset()


class Page(html.parser.HTMLParser):
    """What a page is made of; unclosed tags are an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.headings, self.text, self.links = [], [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_the_overlay_monitors_a_run_and_report_shows_it(prepared, tmp_path, capsys):
    """From the command line to the page, with what a guard would have written."""
    run = tmp_path / "run"
    small = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "intermediate_size": 96}
    command = ["fit", "-c", str(CONFIGS / "quickstart.yaml"), "-c", str(CONFIGS / "stability" / "monitor.yaml")]
    command += [f"--model.config.{name}={value}" for name, value in {"vocab_size": 272, **small}.items()]
    command += [f"--data.path={prepared}", "--data.sequence_length=8", "--data.batch_size=4"]
    command += ["--trainer.max_steps=20", "--trainer.val_check_interval=10", f"--trainer.default_root_dir={run}"]
    main(command)
    shown = capsys.readouterr().out
    assert "The worst of 2 readings" in shown
    assert {path.name for path in run.iterdir()} >= {"fp8.csv", "fp8_heatmap.png", "fp8_layers.png", "metrics.csv"}
    assert [reading.step for reading in table.read(run)] == [10, 20]
    event = '{"step": 10, "kind": "warn", "layer": "decoder.blocks.0", "message": "1 < 2 & <b>"}\n'
    (run / "events.jsonl").write_text(event + '{"step": 2')
    main(["report", str(run), "--reference", str(run)])
    page = Page((run / "report.html").read_text())
    wanted = ["Summary", "Loss", "Gap to the reference", "Events", "Worst layers", "Layers over steps"]
    assert page.headings[:6] == wanted
    assert page.headings[6:] == ["Layers at the last reading", "Throughput", "Memory", "Configuration"]
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "1 < 2 & <b>" in page.text
    assert "+0.000% of" in page.text
    assert "max_steps: 20" in page.text


def test_the_page_of_a_run_that_goes_on_has_what_there_is(tmp_path, capsys):
    log = RunLog(str(tmp_path / "run"))
    for step in range(3):
        log.log_metrics({"train/loss": 3.0 - step}, step)
    main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "page.html")])
    page = Page((tmp_path / "page.html").read_text())
    assert page.headings == ["Summary", "Loss"]
    assert "the run is not over, or was killed" in page.text
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path)])
    assert stopped.value.code == 1
    assert "holds no run" in capsys.readouterr().err


def test_a_guard_hears_each_reading_after_it_is_on_disk(prepared, tmp_path):
    monitor, heard = FP8Monitor(every_n_steps=2), []
    monitor.listeners.append(
        lambda trainer, reading: heard.append((trainer.global_step, table.read(tmp_path)[-1].step))
    )
    readings = readings_of(monitor)
    fit(tmp_path, prepared, monitor)
    assert heard == [(2, 2), (4, 4)]
    assert len(readings) == 2
