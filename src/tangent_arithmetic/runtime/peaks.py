"""The peak memory of this process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
import resource
from pathlib import Path

try:
    LIBC = ctypes.CDLL(None)
except (OSError, TypeError):  # Windows
    LIBC = None  # type: ignore[assignment]


def peak_bytes() -> int:
    """The most memory that this process has held, since `forget_peak` where the system can."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss starts from the parent's memory
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Starts the peak anew, where the system can: Linux. Memory that is free is given back first.

    Otherwise what comes next could hide in it.
    """
    gc.collect()
    with contextlib.suppress(AttributeError):  # another C library
        LIBC.malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
