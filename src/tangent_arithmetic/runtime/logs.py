"""Logging, progress bars, and tracking with Weights & Biases."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import printable, shown
from tangent_arithmetic.runtime.eta import shown_time
from tangent_arithmetic.runtime.private import without_home

logger = logging.getLogger(__name__)
EVERY = 15  # seconds between lines of a log that is no terminal
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


class Progress(Iterable[Item]):
    """Items with a progress bar on rank 0, or, if stderr is no terminal, with lines in the log.

    Args:
        items: what to iterate over.
        description: what is done, for messages.
        total: the number of items, if they have no length.
        done: the number of items that an earlier run did.
        unit: what an item is, for lines in the log.
    """

    def __init__(
        self,
        items: Iterable[Item],
        description: str,
        total: int | None = None,
        done: int = 0,
        unit: str = "batch",
    ) -> None:
        self.items, self.description, self.unit, self.done = items, description, unit, done
        known = total is None and isinstance(items, Sized)
        self.total = len(items) + done if known else total  # type: ignore[arg-type]
        self._pictures, self._facts, self._begin = 0, "", time.monotonic()
        self._bar: Any = None

    def __iter__(self) -> Iterator[Item]:
        """Yields the items."""
        options = {**_bar_options(self.description, self.total), "initial": self.done}
        start, self._begin = self.done, time.monotonic()
        told = self._begin
        lines = bool(options["disable"]) and ddp.is_main_process()
        with logging_redirect_tqdm(), tqdm(self.items, **options) as self._bar:
            for item in self._bar:
                yield item
                self.done += 1
                now = time.monotonic()
                if lines and now - told >= EVERY and self.done != self.total:
                    told = now
                    logger.info("%s", self._line(self.done - start, now - self._begin))

    def note(self, pictures: int = 0, **values: float) -> None:
        """Shows values at the end of the bar or line.

        Args:
            pictures: images of the current item, over all ranks; shown as images per second.
            values: such as the loss.
        """
        self._pictures += pictures
        facts = [f"{name} {value:.3f}" for name, value in values.items()]
        if self._pictures and (spent := time.monotonic() - self._begin) > 0:
            facts.append(f"{self._pictures / spent:.0f} images/s")
        self._facts = ", ".join(facts)
        if self._bar is not None:
            self._bar.set_postfix_str(self._facts, refresh=False)

    def _line(self, count: int, spent: float) -> str:
        """A line for the log: item, values, rate, time left."""
        place = f"{self.description}: {self.unit} {self.done}"
        parts = [place if self.total is None else f"{place} of {self.total}"]
        parts += [self._facts] if self._facts else []
        if self.total is not None:
            parts.append(f"{shown_time((self.total - self.done) * spent / count)} left")
        return ", ".join(parts)


def progress(items: Iterable[Item], description: str, total: int | None = None) -> Progress[Item]:
    """The items with a progress bar or lines in the log, see `Progress`."""
    return Progress(items, description, total)


@contextmanager
def byte_progress(description: str, total: int) -> Iterator[Callable[[int], Any]]:
    """Yields a function that advances a progress bar by a number of bytes."""
    options = _bar_options(description, total)
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, **options) as bar:
        yield bar.update


class Tracker:
    """Passes numbers and files to functions, such as those of a W&B run; by default does nothing.

    Args:
        log: called with values by name, and the keyword `step`.
        show: called with a name and the path of a page or a figure.
    """

    def __init__(
        self,
        log: Callable[..., object] | None = None,
        show: Callable[[str, Path], object] | None = None,
    ) -> None:
        self._log, self._show = log, show

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Logs values by name, at a step if given."""
        if self._log is not None:
            self._log(values, step=step)

    def show(self, name: str, path: Path) -> None:
        """Keeps a page or a figure, if it exists."""
        if self._show is not None and path.is_file():
            self._show(name, path)
