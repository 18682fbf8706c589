"""The batches of a loader while they are used: its workers stop, and waiting for it is told."""

from __future__ import annotations

import logging
import time
from contextlib import closing
from typing import Any

from tangent_arithmetic.data.loading import Loader
from tangent_arithmetic.runtime import ddp

MUCH, A_MOMENT = 0.5, 20.0  # of the time, and of seconds: waiting that is told
logger = logging.getLogger(__name__)


class Waiting:
    """The batches of a loader, and how long their user has waited for them.

    Args:
        loader: the loader.
    """

    def __init__(self, loader: Loader) -> None:
        self._batches, self._begin = iter(loader), time.monotonic()
        self.seconds = 0.0

    def __iter__(self) -> Waiting:
        return self

    def __next__(self) -> Any:
        begin = time.monotonic()
        batch = next(self._batches)
        self.seconds += time.monotonic() - begin
        return batch

    def close(self) -> None:
        """Stops the workers."""
        self._batches.close()

    def note(self, description: str, num_workers: int) -> None:
        """Says so if most of the time went by waiting, of more than a moment."""
        share = self.seconds / max(time.monotonic() - self._begin, 1e-9)
        if ddp.is_main_process() and share > MUCH and self.seconds > A_MOMENT:
            logger.warning(
                "%s: %.0f %% of the time went by waiting for data; make large files smaller, once, "
                "or take more than --num-workers=%d",
                description,
                100 * share,
                num_workers,
            )


def iterating(loader: Loader) -> closing[Waiting]:
    """A context with the batches of a loader; its workers stop on exit, even after an error."""
    return closing(Waiting(loader))
