"""What becomes of readings: `fp8.csv`, the ranking of layers, pictures."""

import math
import struct
from io import BytesIO

import pytest
from matplotlib.axes import Axes

from lightning_fp8.callbacks import Reading
from lightning_fp8.callbacks.monitor import _table
from lightning_fp8.callbacks.watch import table
from lightning_fp8.callbacks.watch.limits import Limit, limit, worst_figures, worst_layers
from lightning_fp8.callbacks.watch.pictures import draw_heat_map, draw_layers, short_name


def reading(step, **underflows):
    """Of layers with so much underflow of the input; all else is well."""
    healthy = {"amax": 4.0, "sqnr": 31.5, "block_sqnr_p5": 29.0, "kurtosis": 1.5}
    return Reading(step, {layer: {"input": {**healthy, "underflow": share}} for layer, share in underflows.items()})


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-30, math.inf, -math.inf])
def test_the_table_keeps_what_was_read(tmp_path, value):
    written = [
        Reading(step, {"a": {"input": {"amax": value}, "weight": {"sqnr": 2.5}}, "b": {"update": {"update_rms": 1.0}}})
        for step in (3, 6)
    ]
    for one in written:
        table.append(tmp_path, one)
    assert table.read(tmp_path) == written
    table.append(tmp_path, Reading(9, {"a": {"input": {"amax": math.nan}}}))
    assert math.isnan(table.read(tmp_path)[-1].values["a"]["input"]["amax"])


def test_every_contract_metric_has_a_column():
    names = "amax underflow saturation sqnr block_sqnr_p5 cosine_distortion kurtosis max_median_ratio scale_drift"
    names += " scale_lag update_rms max_update stalled_updates moment_zeros logit_max entropy log_z swiglu_alignment"
    assert set(table.METRICS) == set(names.split())


@pytest.mark.parametrize(("step", "kept"), [(0, []), (2, [2]), (5, [2, 4]), (6, [2, 4, 6])])
def test_a_resumed_run_keeps_the_readings_before_its_checkpoint(tmp_path, step, kept):
    for at in (2, 4, 6):
        table.append(tmp_path, reading(at, a=0.0))
    table.start_at(tmp_path, step)
    assert [one.step for one in table.read(tmp_path)] == kept
    assert (tmp_path / table.NAME).exists() == bool(kept)


def test_after_a_rewind_the_later_reading_of_a_step_counts(tmp_path):
    for at, share in ((2, 0.1), (4, 0.2), (2, 0.3), (4, 0.4)):
        table.append(tmp_path, reading(at, a=share))
    found = [(one.step, one.values["a"]["input"]["underflow"]) for one in table.read(tmp_path)]
    assert found == [(2, 0.3), (4, 0.4)]


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_line_that_a_kill_cut_is_left_out(tmp_path, cut):
    table.append(tmp_path, reading(2, a=0.125))
    table.append(tmp_path, reading(14, a=0.25))
    path = tmp_path / table.NAME
    path.write_bytes(path.read_bytes()[:-cut])
    assert [one.step for one in table.read(tmp_path)] == [2]


def test_severity_is_1_at_the_limit_and_grows_as_things_get_worse():
    share, decibels = Limit(0.05), Limit(15.0, decibels=True)
    assert share.severity(0.05) == decibels.severity(15.0) == 1
    assert share.severity(0.1) == 2
    assert decibels.severity(9.0) == pytest.approx(2, abs=0.01)
    assert decibels.severity(math.inf) == 0
    assert share.severity(math.nan) == decibels.severity(math.nan) == math.inf
    assert share.severity(-math.inf) == 0


def test_gradients_have_limits_of_their_own():
    assert limit("grad_output", "underflow").value > limit("input", "underflow").value
    assert limit("input", "entropy") is None


def test_the_worst_layers_are_ranked_over_the_whole_run():
    run = [reading(10, b=0.01, a=0.3), reading(20, b=0.02, a=0.0), reading(30, b=0.01, a=0.0)]
    first, second = worst_layers(run, 5)
    assert (first.step, first.figure) == (10, ("a", "input", "underflow", 0.3))
    assert first.severity == pytest.approx(6)
    assert second.figure.layer == "b"
    assert len(worst_layers(run, 1)) == 1
    assert worst_layers([], 3) == []


def test_the_worst_figure_of_a_metric_is_the_largest_or_the_smallest():
    one = Reading(
        1, {"a": {"input": {"sqnr": 31.0, "underflow": 0.5}}, "b": {"input": {"sqnr": 12.0, "underflow": 0.1}}}
    )
    assert worst_figures(one) == {"input/sqnr": 12.0, "input/underflow": 0.5}


def size(picture):
    assert picture.startswith(b"\x89PNG")
    return struct.unpack(">II", picture[16:24])


def test_the_heat_map_has_layers_down_and_steps_across(monkeypatch):
    shown = {}

    def imshow(axes, cells, **options):
        axes.set_title = lambda title, **_: shown.update({title: cells})
        return plain(axes, cells, **options)

    plain = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", imshow)
    draw_heat_map([reading(10, a=0.25, b=0.5), reading(20, a=0.125, b=0.0), reading(30, a=0.0, b=1.0)], BytesIO())
    assert shown["underflow, input"] == [[0.25, 0.125, 0.0], [0.5, 0.0, 1.0]]
    assert shown["SQNR of the worst 5 % of blocks, input (dB)"] == [[29.0] * 3] * 2
    assert shown["kurtosis, input (log10)"] == [pytest.approx([math.log10(1.5)] * 3)] * 2


def test_the_table_of_the_worst_layers_says_where_when_and_by_how_much():
    shown = _table([reading(10, a=0.3, b=0.01), reading(20, a=0.0, b=0.02)], worst=2)
    rows = list(zip(*(column.cells for column in shown.columns), strict=True))
    assert rows[0] == ("a", "input", "10", "underflow", "0.3", "0.05", "6")
    assert rows[1][:2] == ("b", "input")
    assert [row.style for row in shown.rows] == ["bold red", None]


@pytest.mark.parametrize("layers", [1, 14, 300])
@pytest.mark.parametrize("draw", [draw_heat_map, draw_layers])
def test_pictures_have_room_for_few_and_many_layers(tmp_path, draw, layers):
    names = {f"decoder.blocks.{i}.mlp.down_proj": i / layers for i in range(layers)}
    draw([reading(step, **names) for step in (10, 20, 30)], tmp_path / "x.png")
    width, height = size((tmp_path / "x.png").read_bytes())
    assert width > 400
    assert 150 < height < 4000


@pytest.mark.parametrize("draw", [draw_heat_map, draw_layers])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
def test_pictures_bear_what_is_not_a_number(draw, value):
    figures = {"amax": value, "sqnr": value, "block_sqnr_p5": value, "kurtosis": value, "underflow": value}
    odd = Reading(20, {"a": {"input": figures, "grad_output": figures}})
    file = BytesIO()
    draw([reading(10, a=0.0), odd, Reading(30, {"a": odd.values["a"], "b": {"input": {"amax": 1.0}}})], file)
    size(file.getvalue())


def test_nothing_is_drawn_of_a_run_without_linear_layers():
    for draw in (draw_heat_map, draw_layers):
        file = BytesIO()
        draw([Reading(1, {"optimizer": {"update": {"update_rms": 1.0}}})], file)
        assert file.getvalue() == b""


def test_names_are_shortened_so_that_they_stay_different():
    assert short_name("decoder.blocks.11.attention.q_proj") == "11.attn.q"
    assert short_name("net.0") == "net.0"
