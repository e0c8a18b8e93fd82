"""Files that are there whole or not at all, and folders that one process has to itself.

A rename is atomic but may reach the disk before what it renames: hence the flush of the file before it and of the
folder after it. torch.save reports a full disk as an unexpected position in the file; `Recorded` keeps what the disk
said.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
UNFINISHED = ".unfinished"


class Recorded:
    """A file to write to, that remembers why it could not.

    Args:
        file: Open for writing.

    Attributes:
        error: The first that a write met.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        """Writes all of the bytes; a call to the system takes 2 GiB at most, and less on a disk that is nearly full."""
        left = memoryview(content).cast("B")
        size = len(left)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.error = self.error or error
            raise
        return size

    def flush(self) -> None:
        """Hands on what is buffered."""
        self._file.flush()


def write_whole(path: Path, write: Callable[[Recorded], object]) -> None:
    """Writes a file so that a reader, a kill or a full disk finds the old one or the new one.

    Args:
        path: The file; its folder is made.
        write: Writes the content.

    Raises:
        OSError: It cannot be written; what there was is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with unfinished.open("wb", buffering=0) as file:
            recorded = Recorded(file)
            try:
                write(recorded)
            except RuntimeError as error:
                raise recorded.error or error from error
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Likewise, of text in UTF-8."""
    write_whole(path, lambda file: file.write(text.encode()))


def flush_folder(folder: Path) -> None:
    """Has the names in a folder reach the disk, where the system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hold(file: Path, otherwise: str) -> IO[str]:
    """Takes a lock, which lasts until the file that is returned is closed or the process ends, however it ends.

    Args:
        file: It is made, and stays.
        otherwise: What to say if another process has the lock.

    Raises:
        ValueError: Another process has it.
    """
    handle = file.open("w")
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return handle
    try:
        fcntl.lockf(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by forked workers
    except OSError:
        handle.close()
        raise ValueError(otherwise) from None
    return handle
