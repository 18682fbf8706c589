"""Logging, progress bars, and tracking with Weights & Biases."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import printable, shown
from tangent_arithmetic.runtime.private import without_home

Item = TypeVar("Item")


class _Printable(logging.Formatter):
    """A formatter that makes messages safe for terminals, and hides home folders.

    Messages may contain names from untrusted files, and logs may be shared.
    """

    def format(self, record: logging.LogRecord) -> str:
        return printable(str(without_home(super().format(record))))


def setup_logging() -> None:
    """Logs this project's messages to stderr; ranks above 0 log warnings only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(handlers=[handler])
    level = logging.INFO if ddp.is_main_process() else logging.WARNING
    for name in ("tangent_arithmetic", "__main__"):  # a script's logger is named __main__
        logging.getLogger(name).setLevel(level)


def _bar_options(description: str, total: int | None) -> dict[str, Any]:
    quiet = not ddp.is_main_process() or not sys.stderr.isatty()
    return {"desc": shown(description), "total": total, "disable": quiet, "dynamic_ncols": True}


def progress(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yields the items with a progress bar on rank 0, if stderr is a terminal."""
    with logging_redirect_tqdm():
        yield from tqdm(items, **_bar_options(description, total))


@contextmanager
def byte_progress(description: str, total: int) -> Iterator[Callable[[int], Any]]:
    """Yields a function that advances a progress bar by a number of bytes."""
    options = _bar_options(description, total)
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, **options) as bar:
        yield bar.update


class Tracker:
    """Passes numbers to a function, such as `log` of a W&B run; by default does nothing."""

    def __init__(self, log: Callable[..., object] | None = None) -> None:
        self._log = log

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Logs values by name, at a step if given."""
        if self._log is not None:
            self._log(values, step=step)
