"""Freed memory, kept for the next operation."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # parameters of mallopt, and their usual values
USUAL = {TRIM_THRESHOLD: 2**26, MMAP_MAX: 2**16}


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside the block, the C library keeps freed memory on Linux; it is returned on exit.

    PyTorch does not cache memory of a CPU. The tangents along many directions come and go with
    each operation, and the system would fill every page with zeros again: a tenth of the time.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "malloc_trim"):  # not glibc
        yield
        return
    library.mallopt(TRIM_THRESHOLD, -1)
    library.mallopt(MMAP_MAX, 0)
    try:
        yield
    finally:
        for parameter, value in USUAL.items():
            library.mallopt(parameter, value)
        library.malloc_trim(0)
