"""Logging, progress bars, W&B."""

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
    """Messages as a terminal can safely show them: names from files may hold anything.

    A log may be kept in a file and shared, so that home folders are not named.
    """

    def format(self, record: logging.LogRecord) -> str:
        return printable(str(without_home(super().format(record))))


def setup_logging() -> None:
    """Sends this project's messages to stderr; other ranks than the first only warn."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(message)s"))
    logging.basicConfig(handlers=[handler])
    level = logging.INFO if ddp.is_main_process() else logging.WARNING
    for name in ("tangent_arithmetic", "__main__"):  # a script's own logger is named __main__
        logging.getLogger(name).setLevel(level)


def progress(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yields the items under a bar with ETA; no bar on other ranks or where stderr is a file."""
    quiet = not ddp.is_main_process() or not sys.stderr.isatty()
    with logging_redirect_tqdm():
        yield from tqdm(
            items, desc=shown(description), total=total, disable=quiet, dynamic_ncols=True
        )


@contextmanager
def byte_progress(description: str, total: int) -> Iterator[Callable[[int], Any]]:
    """Gives a function to call with the bytes done; shows a bar with bytes a second, as above."""
    quiet = not ddp.is_main_process() or not sys.stderr.isatty()
    with tqdm(desc=shown(description), total=total, unit="B", unit_scale=True, unit_divisor=1024,
              disable=quiet, dynamic_ncols=True) as bar:  # fmt: skip
        yield bar.update


class Tracker:
    """Logs numbers to a W&B run, or nowhere without one."""

    def __init__(self, wandb_run: Any = None) -> None:
        self._run = wandb_run

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Logs numbers, optionally at a step."""
        if self._run is not None:
            self._run.log(values, step=step)
