import struct

from lightning_fp8.callbacks.plots import _smooth, plot_loss

ROWS = [{"step": str(i), "train/loss": str(5 - i / 50), "val/loss": "4.5" if i % 25 == 24 else ""} for i in range(100)]


def test_smoothing_follows_a_line_without_lag():
    line = [float(i) for i in range(100)]
    assert _smooth(line)[5:95] == line[5:95]
    assert _smooth([3.0]) == [3.0]


def test_the_plot_is_a_picture(tmp_path):
    plot_loss(ROWS, tmp_path / "loss.png")
    content = (tmp_path / "loss.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == (1152, 648)  # 8 x 4.5 inches at 144 dots an inch


def test_a_run_without_validation_is_drawn_and_an_empty_one_is_not(tmp_path):
    plot_loss([{**row, "val/loss": ""} for row in ROWS], tmp_path / "train.png")
    plot_loss([], tmp_path / "empty.png")
    assert (tmp_path / "train.png").exists()
    assert not (tmp_path / "empty.png").exists()
