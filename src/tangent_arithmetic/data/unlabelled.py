"""Images without labels, a batch an optimizer step, as a function of the step alone."""

from __future__ import annotations

import bisect
import copy
import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from tangent_arithmetic.data.base import Pictures, name_of
from tangent_arithmetic.data.loading import Batches, BatchPlan, Key, Transform, train_loader
from tangent_arithmetic.runtime import ddp

OFFSET = 7919  # between the seeds of the sets, and that of the labelled images


class Joined:
    """Several data sets as one, without their labels."""

    def __init__(self, parts: Mapping[str, Pictures]) -> None:
        self.parts = list(parts.values())
        self.starts = [0, *itertools.accumulate(len(part) for part in self.parts)]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        part = bisect.bisect_right(self.starts, index) - 1
        return self.parts[part][index - self.starts[part]][0], 0

    def name_of(self, index: int) -> str:
        """The name of an image in its own data set."""
        part = bisect.bisect_right(self.starts, index) - 1
        return name_of(self.parts[part], index - self.starts[part])


class Rounds(Batches):
    """The images of this rank for every step from `start` on, without end.

    A set is shuffled anew each time all of its images have been used.

    Args:
        parts: the sets.
        transform: maps a picture or a text to a tensor.
        batch_size: images of a set and step, over all ranks.
        together: whether a step takes a batch of each set, instead of one set in turn.
        seed: of the order.
        start: the first step.
    """

    def __init__(
        self,
        parts: Sequence[Pictures],
        transform: Transform | None,
        batch_size: int,
        together: bool,
        seed: int,
        start: int = 0,
    ) -> None:
        self.plans = [
            BatchPlan.of(part, transform, min(batch_size, len(part)), seed=seed + OFFSET * (i + 1))
            for i, part in enumerate(parts)
        ]
        self.starts = [0, *itertools.accumulate(map(len, parts))]
        self.together, self.seed, self.start = together, seed, start
        self._orders = dict[int, tuple[int, np.ndarray]]()

    def beginning(self, start: int) -> Rounds:
        """The same from another step on."""
        other = copy.copy(self)
        other.start, other._orders = start, {}
        return other

    def __iter__(self) -> Iterator[list[Key]]:
        for step in itertools.count(self.start):
            visit, chosen = self._turn(step)
            keys = [key for i in chosen for key in self._keys(i, visit)]
            yield keys[ddp.rank() :: ddp.world_size()] or keys[:1]

    def sizes(self, step: int) -> tuple[int, int]:
        """The images of a step, on this rank and on all of them."""
        visit, chosen = self._turn(step)
        total = sum(sum(self.plans[i].micro_sizes(visit)) for i in chosen)
        return len(range(ddp.rank(), total, ddp.world_size())), total

    def _turn(self, step: int) -> tuple[int, Sequence[int]]:
        """The sets of a step, and how often they have been visited before."""
        count = len(self.plans)
        return (step, range(count)) if self.together else (step // count, [step % count])

    def _keys(self, part: int, visit: int) -> list[Key]:
        plan = self.plans[part]
        epoch = visit // plan.steps_per_epoch
        if self._orders.get(part, (-1,))[0] != epoch:
            self._orders[part] = (epoch, plan.permutation(epoch))
        (keys,) = plan.micro_batches(visit, self._orders[part][1])
        return [(epoch, self.starts[part] + index) for _, index in keys]


class Unlabelled:
    """The images of other data sets, a batch a step.

    Args:
        parts: the data sets by name.
        transform: maps a picture to a tensor.
        batch_size: images of a set and step, over all ranks.
        together: whether a step takes images of all sets, instead of one set in turn.
        seed: of order and augmentation.
        num_workers: data-loading processes.
    """

    def __init__(
        self,
        parts: Mapping[str, Pictures],
        transform: Transform | None,
        batch_size: int,
        together: bool = False,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        self.pictures, self.transform = Joined(parts), transform
        self.batch_size, self.together, self.seed = batch_size, together, seed
        self.num_workers = num_workers
        self._batches: Generator[Any] | None = None
        self._next = -1

    def batch(self, step: int) -> Tensor:
        """The images of an optimizer step, this rank's share; steps in a row are loaded ahead."""
        if self._batches is None or step != self._next:
            self.close()
            rounds = self._rounds.beginning(step)
            loader = train_loader(self.pictures, self.transform, rounds, self.num_workers)
            self._batches = iter(loader)
        self._next = step + 1
        images: Tensor = next(self._batches)[0]
        return images

    def weight(self, step: int) -> float:
        """What a rank's mean counts, so that the mean over ranks is that over the step's images."""
        own, total = self._rounds.sizes(step)
        return own * ddp.world_size() / total

    @cached_property
    def _rounds(self) -> Rounds:  # of texts it counts all tokens
        how = self.batch_size, self.together, self.seed
        return Rounds(self.pictures.parts, self.transform, *how)

    def close(self) -> None:
        """Stops the loading."""
        if self._batches is not None:
            self._batches.close()
        self._batches = None
