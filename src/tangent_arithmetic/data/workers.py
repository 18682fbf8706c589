"""Why the processes of a data loader ended: an error with its cause and a way out."""

from __future__ import annotations

import errno
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from tangent_arithmetic.runtime.errors import RunError, shown

SHARED_MEMORY = "/dev/shm"  # on Linux
NO_SHARED_MEMORY = ("shared memory", "unable to write to file", "unable to resize file", "</torch_")
BUS_ERROR = getattr(signal, "SIGBUS", None)  # raised by a write beyond the available shared memory
NO_DESCRIPTORS = ("Too many open files", "ancdata")


@contextmanager
def without_sigchld_handler() -> Iterator[None]:
    """Undoes PyTorch's SIGCHLD handler, which would raise at any point when a worker dies.

    The iterator detects a dead worker within seconds anyway, while it waits for a batch.
    """
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def exit_codes(workers: Sequence[BaseProcess]) -> list[int]:
    """The non-zero exit codes of workers that have ended, or end within a second."""
    ended = wait([worker.sentinel for worker in workers], timeout=1) if workers else []
    for worker in workers:
        if worker.sentinel in ended:
            worker.join(1)
    return [worker.exitcode for worker in workers if worker.exitcode]


def worker_failure(error: Exception, codes: Sequence[int], started: bool) -> RunError | None:
    """Explains an error of the iterator, given non-zero exit codes; None if no worker caused it."""
    text = str(error)
    bus_error = BUS_ERROR is not None and -BUS_ERROR in codes
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if bus_error or full or any(part in text for part in NO_SHARED_MEMORY):
        return RunError(
            f"data-loading processes need more shared memory than {_shared_memory()}. Increase it "
            "(docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm), or load in this "
            "process: --num-workers=0"
        )
    if any(part in text for part in NO_DESCRIPTORS):
        return RunError(
            "too many open files for the data-loading processes; raise the limit (ulimit -n), or "
            "load in this process: --num-workers=0"
        )
    if text.startswith("Caught "):  # an error of the transform, raised in a healthy worker
        return None
    if not started:
        return RunError(
            f"data-loading processes cannot be started ({type(error).__name__}: {shown(error)}); "
            "try fewer, or none: --num-workers=0"
        )
    if codes or "exited unexpectedly" in text or isinstance(error, OSError | EOFError):
        return RunError(
            f"a data-loading process {_end_of(codes[0] if codes else None)}, which ended the run; "
            "try fewer, or none: --num-workers=0"
        )
    return None


def _shared_memory() -> str:
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError:
        return "this system has"
    return f"{SHARED_MEMORY} has ({usage.free / 2**20:.3g} of {usage.total / 2**20:.3g} MiB free)"


def _end_of(code: int | None) -> str:
    if code is None:
        return "exited"
    if code > 0:
        return f"exited with code {code}"
    memory = ", possibly out of memory" if code == -signal.SIGKILL else ""
    return f"was killed ({signal.Signals(-code).name}{memory})"
