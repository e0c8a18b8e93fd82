"""A failing disk or machine costs no more than the steps since the last checkpoint, and no checkpoint ever."""

import csv
import errno
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hostile.world import CKPT, fit, flip_bit, make

from lightning_fp8 import files
from lightning_fp8.callbacks import RunLog, checkpoint
from lightning_fp8.cli.main import main
from lightning_fp8.data import prepare

STEPS = 24
EVERY = ["--trainer.callbacks.every_n_steps=3", "--data.num_workers=0"]
SECONDS_AFTER_SIGTERM = 10  # that a cluster has to grant; a step of a large model comes on top


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """A folder with data, a configuration and a whole run, `whole`."""
    folder = tmp_path_factory.mktemp("right")
    make(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lightning-fp8"])
        patch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
        train("whole")
    return folder


@pytest.fixture
def world(right, monkeypatch):
    monkeypatch.chdir(right)
    monkeypatch.setattr(sys, "argv", ["lightning-fp8"])
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    return right


def options(name, *more, steps=STEPS):
    return fit(f"--trainer.default_root_dir={name}", f"--trainer.max_steps={steps}", *EVERY, *more)


def train(name, *more, steps=STEPS):
    main(options(name, *more, steps=steps))


def begin(name, *more, steps=STEPS):
    """Starts a run in a process of its own."""
    command = [sys.executable, "-m", "lightning_fp8", *options(name, *more, steps=steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def content(name):
    return torch.load(Path(name, *Path(CKPT).parts[1:]), weights_only=True)


def losses(name):
    with Path(name, "metrics.csv").open(newline="") as file:
        rows = [(int(row["step"]), row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
    assert len(dict(rows)) == len(rows)  # a step is logged once
    return dict(rows)


def assert_the_same(name):
    """Bit for bit the end of the run that nothing happened to: weights, moments, and every row of the log."""
    ours, theirs = content(name), content("whole")
    assert ours["global_step"] == theirs["global_step"]
    assert all(torch.equal(ours["state_dict"][key], value) for key, value in theirs["state_dict"].items())
    for key, state in theirs["optimizer_states"][0]["state"].items():
        for field, value in state.items():
            assert torch.equal(
                torch.as_tensor(ours["optimizer_states"][0]["state"][key][field]), torch.as_tensor(value)
            )
    assert losses(name) == losses("whole")


def wait_for_step(process, name, step):
    deadline = time.monotonic() + 200
    while not (Path(name, "metrics.csv").exists() and len(losses(name)) > step):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_checkpoint_before_is_used_if_the_newest_is_damaged(world):
    train("damaged", steps=20)  # saves 15, 18 and 20
    flip_bit("damaged/checkpoints/last.ckpt", 0.4)
    with pytest.warns(UserWarning, match=r"checksum of its record .* Going on from .*last\.ckpt\.previous"):
        train("damaged", "--ckpt_path=last")
    assert_the_same("damaged")


def test_a_stop_between_a_save_and_its_row_loses_no_row(world, monkeypatch):
    """Lightning writes the row of a step after the callbacks, and so after the checkpoint of that step."""
    put_in_place = checkpoint.put_in_place

    def stop_at_the_fourth(new, path):
        put_in_place(new, path)
        if torch.load(path, weights_only=True)["global_step"] == 12:
            raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "put_in_place", stop_at_the_fourth)
        with pytest.raises(SystemExit):
            train("between")
    assert max(losses("between")) == 10
    assert content("between")["global_step"] == 12
    train("between", "--ckpt_path=last")
    assert_the_same("between")


def test_a_save_without_room_costs_no_checkpoint_and_not_the_run(world, monkeypatch):
    write, saves = files.Recorded.write, []

    def full_at_the_fourth(self, block):
        if ".ckpt" in str(self._file.name) and self not in saves:
            saves.append(self)
        if self not in saves[3:4] or (self.error is None and self._file.tell() == 0):
            return write(self, block)
        self.error = OSError(errno.ENOSPC, "No space left on device", self._file.name)
        raise self.error

    monkeypatch.setattr(files.Recorded, "write", full_at_the_fourth)
    with pytest.warns(UserWarning, match="No room for the checkpoint of step 12 .* that of step 9 is kept"):
        train("full")
    assert_the_same("full")
    assert not list(Path("full").rglob("*.unfinished"))


def test_a_last_save_without_room_ends_the_run_and_leaves_the_checkpoint_before(world, monkeypatch, capsys):
    train("ended", steps=6)

    def full(self, block):
        self.error = OSError(errno.ENOSPC, "No space left on device", "the disk")
        raise self.error

    with monkeypatch.context() as patch:
        patch.setattr(files.Recorded, "write", full)
        with pytest.raises(SystemExit) as stopped:
            train("ended", "--ckpt_path=last", steps=8)
    assert stopped.value.code == 1
    assert "no space left on device; make room" in capsys.readouterr().err
    assert content("ended")["global_step"] == 6
    train("ended", "--ckpt_path=last")
    assert_the_same("ended")


def test_rows_without_room_wait(tmp_path, monkeypatch):
    log = RunLog(str(tmp_path))
    log.log_metrics({"loss": 0.5}, 0)
    before = log.file.read_bytes()

    class Full:
        """Takes a part of what it is given."""

        def __init__(self, file):
            self.file = file

        def write(self, block):
            return self.file.write(block[:3])

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    opened = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode="r", *a, **k: Full(opened(path, mode, *a, **k)))
        with pytest.warns(UserWarning, match=r"No room for .*metrics\.csv"):
            log.log_metrics({"loss": 0.25}, 1)
        log.log_metrics({"loss": 0.125}, 2)
    assert log.file.read_bytes() == before
    log.log_metrics({"loss": 0.0625}, 3)
    assert [(row["step"], row["loss"]) for row in log.rows()] == [
        ("0", "0.5"),
        ("1", "0.25"),
        ("2", "0.125"),
        ("3", "0.0625"),
    ]


def test_a_preparation_without_room_leaves_the_folder_and_is_continued(world, monkeypatch, capsys):
    arguments = ["--sources", "[x.jsonl]", "--workers=1", "--output_dir", "again", "--val_fraction=0.2"]
    main(["prepare", *arguments, "--vocab_size=272"])
    before = {path: path.read_bytes() for path in Path("again").rglob("*") if path.is_file()}

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "the disk")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["lightning_fp8.data.prepare"], "write_chunks", full)
        with pytest.raises(SystemExit) as stopped:
            main(["prepare", *arguments, "--vocab_size=290"])
    assert stopped.value.code == 1
    assert "no space left on device; make room" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    main(["prepare", *arguments, "--vocab_size=290"])
    fresh = prepare(["x.jsonl"], "fresh", vocab_size=290, val_fraction=0.2, workers=1)
    assert Path("again/train/chunk-0-0.bin").read_bytes() == Path("fresh/train/chunk-0-0.bin").read_bytes()
    assert fresh.vocab_size == 290


def test_sigterm_saves_and_ends_well(world):
    with begin("ended_by_sigterm") as process:
        wait_for_step(process, "ended_by_sigterm", 7)
        process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        said = process.communicate(timeout=60)[0]
        took = time.monotonic() - asked
    assert process.returncode == 0, said
    assert took < SECONDS_AFTER_SIGTERM
    step = content("ended_by_sigterm")["global_step"]
    assert f"SIGTERM: saved step {step}" in said
    assert step == len(losses("ended_by_sigterm")) < STEPS  # not a step is lost
    train("ended_by_sigterm", "--ckpt_path=last")
    assert_the_same("ended_by_sigterm")


def test_ctrl_c_twice_ends_with_the_checkpoint_and_no_traceback(world):
    with begin("interrupted", steps=5000) as process:
        wait_for_step(process, "interrupted", 4)
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 1, said
    assert "Traceback" not in said
    assert "fit` goes on with --ckpt_path last" in said
    assert content("interrupted")["global_step"] % 3 == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_kill_at_any_moment_loses_no_bit(world, seed):
    """SIGKILL between the first save and the end, at a random moment and not at a step; then `--ckpt_path last`."""
    name = f"killed{seed}"
    generator = random.Random(seed)
    with begin(name) as process:
        wait_for_step(process, name, generator.randrange(STEPS - 4))
        time.sleep(generator.random() * 0.1)
        process.kill()
        process.communicate(timeout=60)
    train(name, "--ckpt_path=last")
    assert_the_same(name)


@pytest.fixture
def disk(world, tmp_path, request):
    """A real one, with room for a whole run, but for `request.param` of a checkpoint that a file in it takes."""
    one = Path("whole/checkpoints/last.ckpt").stat().st_size
    folder = tmp_path / "disk"
    folder.mkdir()
    size = 3 * one + 200_000
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("this user may not mount a tmpfs; the tests above fail the file layer instead")
    (folder / "ballast").write_bytes(bytes(int(one * request.param)))
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(("disk", "kept"), [(1.0, 6), (2.0, 3), (3.0, None)], indirect=["disk"])
def test_a_small_disk(disk, kept):
    """The saves that fit are whole, the others cost a warning, and the last ends the run in one line."""
    run = disk / "run"
    with begin(run) as process:
        said = process.communicate(timeout=200)[0]
    assert process.returncode == 1, said
    assert "Traceback" not in said
    assert "No room for the checkpoint of step" in said
    assert "no space left on device; make room" in said
    assert not list(run.rglob("*.unfinished"))
    if kept is None:
        assert not (run / "checkpoints/last.ckpt").exists()
    else:
        assert content(run)["global_step"] == kept
    (disk / "ballast").unlink()
    train(run, "--ckpt_path=last")
    assert_the_same(run)
