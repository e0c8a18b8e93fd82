"""Which process of a job was lost, said by those that are left.

torch ends a collective whose peer is gone or late with an error, within the process group's timeout, and does not say
which process it was. So each process counts aloud: a thread writes a number that grows into the job's store. Who
runs into such an error listens for a while. A process that does not count any more is dead, stopped or out of reach;
one that counts and has not failed itself is stuck before the exchange. Only numbers that change are compared, never
clocks. The store is on the host of rank 0 (of torchrun's agent there): if that is gone, nobody answers, which is said.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

REMEDY = (
    "See the log of that process and of its machine (out of memory, a full disk, a data loader that waits). To go on"
    " from the last checkpoint, start again with --ckpt_path last; torchrun --max-restarts N does so by itself."
)
_BEAT = 1.0  # seconds between two counts
_PATIENCE = 4.0  # seconds to listen for counts; and again at most, for a store that does not answer
_LOST = "lost another process"  # the mark of one that ends because of another


class LostPeerError(ConnectionError):
    """Another process of the job is dead, stuck or out of reach."""


class Peers:
    """This process's count among those of the others; from `start` to `stop`."""

    def __init__(self) -> None:
        self.step = 0
        self._ended = threading.Event()
        self._store: Store | None = None

    def start(self) -> None:
        """Begins to count, if there are other processes; each of them must."""
        if self._store is not None or not dist.is_available() or not dist.is_initialized():
            return
        # A connection of its own: torch's waits in line behind whatever the main thread asks the store for.
        self._store = PrefixStore("lightning_fp8/peers", _get_default_store().clone())
        self._store.set_timeout(timedelta(seconds=_PATIENCE))
        self._ended.clear()
        threading.Thread(target=self._count, args=(self._store,), daemon=True, name="peers").start()

    def stop(self) -> None:
        """Counts no more."""
        self._ended.set()
        self._store = None

    def _count(self, store: Store) -> None:
        count = 0
        try:
            while not self._ended.is_set():
                store.set(f"count/{dist.get_rank()}", str(count))
                count += 1
                self._ended.wait(_BEAT)
        except RuntimeError:  # the store is gone, as it is at the end of a job
            return

    def explain(self, error: BaseException) -> str | None:
        """Who was lost, if `error` is of a collective, in three lines at most; and lets the others know of any error.

        Takes up to 8 seconds.
        """
        lost = _is_of_a_collective(error)
        if not dist.is_available() or not dist.is_initialized():
            return f"not all processes of the job have met: {_first_line(error)}.\n{REMEDY}" if lost else None
        rank = dist.get_rank()
        if self._store is None:
            culprit = "another process was lost"
        else:
            found: list[str] = []
            why = _LOST if lost else f"{type(error).__name__}: {_first_line(error)}"
            if not isinstance(error, Exception):  # asked to end, by torchrun or at the keyboard
                return None
            arguments = (self._store, rank, why, found)
            asking = threading.Thread(target=_ask, args=arguments, daemon=True)
            asking.start()
            asking.join(2 * _PATIENCE if lost else 1.0)
            culprit = found[0] if found else "rank 0 was lost, or its machine: the job's store does not answer"
        here = f"rank {rank} of {dist.get_world_size()}, at optimizer step {self.step}"
        return f"{here}: {culprit} ({_first_line(error)}).\n{REMEDY}" if lost else None


def loss_said_of(error: BaseException) -> str | None:
    """What `explain` has said of `error`, if that was noted with it."""
    return next((note for note in getattr(error, "__notes__", ()) if note.endswith(REMEDY)), None)


@contextmanager
def naming_lost_peers() -> Iterator[Peers]:
    """Around a training loop of Fabric or plain torch: errors of collectives say which process was lost.

    Raises:
        LostPeerError: A collective has failed.
    """
    peers = Peers()
    peers.start()
    try:
        yield peers
    except Exception as error:
        message = peers.explain(error)
        if message is None:
            raise
        raise LostPeerError(message) from error
    finally:
        peers.stop()


def _is_of_a_collective(error: BaseException) -> bool:
    """Whether torch has raised it for want of another process."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _ask(store: Store, rank: int, why: str, found: list[str]) -> None:
    """Tells the others why this process ends and, if because of another, finds out of which."""
    try:
        store.set(f"ended/{rank}", why)
        if why != _LOST:
            return
        ranks = range(dist.get_world_size())
        before = _counts(store, ranks)
        threading.Event().wait(_PATIENCE)
        after = _counts(store, ranks)
        ended = {r: store.get(f"ended/{r}").decode() for r in ranks if store.check([f"ended/{r}"])}
        found.append(name_culprit(before, after, ended))
    except RuntimeError:  # it does not answer
        return


def _counts(store: Store, ranks: Sequence[int]) -> list[str]:
    keys = [f"count/{r}" for r in ranks]
    return [store.get(key).decode() if store.check([key]) else "" for key in keys]


def name_culprit(before: Sequence[str], after: Sequence[str], ended: dict[int, str]) -> str:
    """Who was lost, in words.

    Args:
        before: The counts of all ranks.
        after: The same a while later.
        ended: Why ranks ended, of those that could say so.
    """
    failed = [f"rank {rank} failed with {why}" for rank, why in sorted(ended.items()) if why != _LOST]
    if failed:
        return "; ".join(failed)
    others = [rank for rank in range(len(after)) if rank not in ended]
    silent = [rank for rank in others if before[rank] == after[rank]]
    if silent:
        return f"{_ranks(silent)} does not answer: killed, stopped or out of reach"
    if others:
        return f"{_ranks(others)} is alive and did not come to the exchange within the timeout"
    return "the network between the processes failed, all of which are alive"


def _ranks(ranks: Sequence[int]) -> str:
    return " and ".join(f"rank {rank}" for rank in ranks)


def _first_line(error: BaseException) -> str:
    """Of what it says, without the place in torch's source."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split("] ", 1)[-1].split(". This is typically")[0].rstrip(".")[:160]
