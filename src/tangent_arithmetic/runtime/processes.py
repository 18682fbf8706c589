"""Signals, locks and the lifetime of worker processes."""

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
except ImportError:  # Windows: no locking
    fcntl = None  # type: ignore[assignment]

PR_SET_PDEATHSIG = 1  # of prctl(2)
WORKER_SECONDS = 60  # how long a data-loading worker of training survives SIGTERM


class Stopped(SystemExit):
    """The process stopped cleanly on a signal; the exit code is 128 + its number."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


@contextlib.contextmanager
def deferred_signals(then: Callable[[int], None] | None = None) -> Iterator[Callable[[], int]]:
    """Records SIGTERM and SIGINT during the block instead of terminating.

    A second SIGINT (Ctrl-C) raises `KeyboardInterrupt`. SIGTERM may be repeated, as launchers do.

    Args:
        then: called with each signal.

    Yields:
        A function that returns the first signal, or 0 if there was none.
    """
    received: list[int] = []

    def record(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(signum)
        if then is not None:
            then(signum)

    if threading.current_thread() is not threading.main_thread():  # handlers need the main thread
        yield lambda: 0
        return
    before = {s: signal.signal(s, record) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def one_at_a_time(place: Path) -> Iterator[None]:
    """Locks an existing folder or file: one process at a time runs such a block for it.

    A lock ends with its process and leaves no file behind. On file systems without locks the block
    runs unprotected.
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
    """Acquires an exclusive advisory lock on an open file, released when it is closed.

    Args:
        handle: the file descriptor.
        wait: whether to wait for the process that holds the lock.

    Returns:
        Whether the lock was acquired; False if another process holds it, or if the file system
        does not support locks.
    """
    if fcntl is None:
        return False
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


@contextlib.contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Blocks Ctrl-C in processes spawned in the block until they call `ignore_interrupts`.

    A terminal sends it to all processes of a job, including those that are still importing.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # its start unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_interrupts() -> None:
    """Makes this process ignore Ctrl-C, which its parent handles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def die_with_parent() -> None:
    """Makes the kernel kill this process when its parent ends (on Linux only)."""
    if sys.platform != "linux":
        return
    started_by = multiprocessing.parent_process()
    parent = os.getppid() if started_by is None else started_by.pid
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent has already ended
        os._exit(1)


def prepare_worker(index: int) -> None:
    """Makes data-loading worker `index` end with its parent and ignore Ctrl-C."""
    die_with_parent()
    ignore_interrupts()


def prepare_training_worker(index: int) -> None:
    """Like `prepare_worker`, for training: the worker also survives SIGTERM for a while.

    Clusters send SIGTERM to all processes of a job. The parent still needs its workers to finish
    the step, and then ends them.
    """
    prepare_worker(index)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_SECONDS))


def usable_cores() -> int:
    """The number of CPU cores available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
