"""Files are written whole, however little of them the system takes at a time."""

import errno
import os
from pathlib import Path

import pytest
import torch

from lightning_fp8.files import UNFINISHED, Recorded, write_text, write_whole


class Sparing:
    """A file of which each write takes at most so many bytes, as Linux takes 2 GiB of a file without a buffer."""

    def __init__(self, at_most: int, room: int = 1 << 40) -> None:
        self.content, self.at_most, self.room = bytearray(), at_most, room

    def write(self, content: memoryview) -> int:
        taken = content[: min(self.at_most, self.room)]
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.content += taken
        self.room -= len(taken)
        return len(taken)


@pytest.mark.parametrize("at_most", [1, 7, 1000, 1 << 20])
def test_all_is_written_where_a_write_takes_a_part(at_most: int) -> None:
    content = os.urandom(5000)
    file = Sparing(at_most)
    assert Recorded(file).write(content) == len(content)
    assert bytes(file.content) == content


def test_the_lengths_of_what_is_not_bytes_are_of_its_bytes() -> None:
    numbers = torch.arange(300).numpy()
    file = Sparing(64)
    assert Recorded(file).write(numbers) == numbers.nbytes
    assert bytes(file.content) == numbers.tobytes()


def test_a_disk_that_takes_the_first_part_only_is_full() -> None:
    recorded = Recorded(Sparing(64, room=100))
    with pytest.raises(OSError, match="No space") as raised:
        recorded.write(bytes(200))
    assert raised.value.errno == errno.ENOSPC
    assert recorded.error is raised.value


@pytest.mark.slow
def test_a_tensor_of_more_than_2_gib_is_saved(tmp_path: Path) -> None:
    tensor = torch.zeros(2**31 + 5000, dtype=torch.uint8)
    tensor[-1] = 7
    path = tmp_path / "large.pt"
    write_whole(path, lambda file: torch.save(tensor, file))
    assert torch.load(path, mmap=True, weights_only=True)[-1] == 7
    path.unlink()


def test_what_there_was_stays_if_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.txt"
    write_text(path, "déjà\n")

    def fail(file: Recorded) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_whole(path, fail)
    assert path.read_bytes() == "déjà\n".encode()
    assert not path.with_name(path.name + UNFINISHED).exists()
