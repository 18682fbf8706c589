"""What a process owes to others: stop when asked, end with its parent, write one at a time."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType

try:
    import fcntl
except ImportError:  # Windows, where processes are not kept apart
    fcntl = None  # type: ignore[assignment]

PR_SET_PDEATHSIG = 1  # of prctl(2)
WORKER_SECONDS = 60  # what a training run's worker goes on for after SIGTERM, if not ended before


class Stopped(SystemExit):
    """A signal asked the process to stop, and it did so in good order: exit code 128 + signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


@contextlib.contextmanager
def deferred_signals(then: Callable[[int], None] | None = None) -> Iterator[Callable[[], int]]:
    """Notes SIGTERM and SIGINT in the block instead of ending there and then.

    A second SIGINT (Ctrl-C) interrupts as usual. SIGTERM may come again: launchers repeat it.

    Args:
        then: called with each signal.

    Yields:
        A function that gives the signal that came first, 0 if none did.
    """
    noted: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and signal.SIGINT in noted:
            raise KeyboardInterrupt
        noted.append(signum)
        if then is not None:
            then(signum)

    if threading.current_thread() is not threading.main_thread():  # only there can it be done
        yield lambda: 0
        return
    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: noted[0] if noted else 0
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def one_at_a_time(place: Path) -> Iterator[None]:
    """Waits until no other process is in such a block for the same place, and keeps others out.

    The lock is on the folder or file itself; nothing is left behind, however a process ends. Where
    the file system has no locks the block runs unguarded.

    Args:
        place: an existing folder or file.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(place, os.O_RDONLY)
    try:
        lock(handle)
        yield
    finally:
        os.close(handle)


def lock(handle: int, wait: bool = True) -> bool:
    """Locks an open file against other processes that do the same, until it is closed.

    Args:
        handle: the file's descriptor.
        wait: whether to wait for the process that has the lock.

    Returns:
        Whether it is locked now; False where another process has the lock, and where the file
        system has no locks.
    """
    if fcntl is None:
        return False
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


@contextlib.contextmanager
def starting_deaf() -> Iterator[None]:
    """Has processes that are spawned in the block not hear Ctrl-C before they `ignore_interrupts`.

    A terminal sends it to every process of a job, also to one that still imports what it needs.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # it unblocks the signal when it is started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_interrupts() -> None:
    """Leaves it to the parent of this process to act on Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def die_with_parent() -> None:
    """Has the kernel kill this process when its parent ends, however that ends.

    On Linux; elsewhere it does nothing.
    """
    if sys.platform != "linux":
        return
    started_by = multiprocessing.parent_process()
    parent = os.getppid() if started_by is None else started_by.pid
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def prepare_worker(index: int) -> None:
    """Makes a data-loading worker end with its parent, and leaves Ctrl-C to the parent.

    Args:
        index: of the worker.
    """
    die_with_parent()
    ignore_interrupts()


def prepare_training_worker(index: int) -> None:
    """Makes a worker end with its parent, and leaves it to the parent to act on signals.

    A cluster sends SIGTERM, and a terminal Ctrl-C, to every process of a job. The parent still
    needs its workers to finish the step; then it ends them.

    Args:
        index: of the worker.
    """
    prepare_worker(index)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_SECONDS))


def usable_cores() -> int:
    """The cores that this process may use, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
