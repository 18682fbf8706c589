"""The time left of long work whose steps have costs that are roughly known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A step of the work.

    Attributes:
        kind: steps of a kind have the same pace, in seconds per cost.
        cost: expected, in any unit.
    """

    kind: str
    cost: float


class Estimate:
    """Time left, from the pace of the steps that are done.

    The pace of a kind is measured as soon as one of its steps is done; until then it is the pace of
    all that is done.

    Args:
        steps: all steps, in order.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = list(steps)
        self._next = 0
        self._seconds: dict[str, float] = {}
        self._costs: dict[str, float] = {}

    def done(self, seconds: float) -> None:
        """The next step is done; it took so many seconds."""
        step = self.steps[self._next]
        self._seconds[step.kind] = self._seconds.get(step.kind, 0.0) + seconds
        self._costs[step.kind] = self._costs.get(step.kind, 0.0) + step.cost
        self._next += 1

    def skip(self) -> None:
        """The next step had been done before, and tells nothing about the pace."""
        self._next += 1

    def left(self) -> float | None:
        """Seconds left; None before the first step is done."""
        if not self._costs:
            return None
        overall = sum(self._seconds.values()) / sum(self._costs.values())
        return sum(step.cost * self._pace(step.kind, overall) for step in self.steps[self._next :])

    def _pace(self, kind: str, overall: float) -> float:
        return self._seconds[kind] / self._costs[kind] if kind in self._costs else overall


def shown_time(seconds: float) -> str:
    """A time for people: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
