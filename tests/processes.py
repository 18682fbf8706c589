"""What tests of processes share."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for its parent to notice its end."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return text.rpartition(") ")[2][0] in "ZX"


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits until something is so.

    Raises:
        AssertionError: if it is not after some seconds.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {seconds} s"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """The processes that a process has started and that live."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(word) for word in task.read_text().split()]
    return found
