"""Step functions of a coefficient, and the plateaus where they are best.

Functions are continuous from the right: at an edge the value is that just above it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from tangent_arithmetic.arithmetic.coefficients import ROUNDING
from tangent_arithmetic.runtime.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float64

# narrower pieces do not count, since features in float32 do not resolve them; beyond 1 in absolute
# value it is relative to a coefficient
RESOLUTION = 1e-6


@dataclass(frozen=True)
class Plateau:
    """A range of coefficients, low <= lambda < high, in which a step function is constant.

    Attributes:
        low: its lower end; may be infinite.
        high: its upper end; may be infinite.
        value: of the function.
    """

    low: float
    high: float
    value: float

    @property
    def coefficient(self) -> float:
        """The middle; of an unbounded plateau the point nearest 0 that is 1 or more inside.

        Ends far from 0 are kept away from by `RESOLUTION` of their size.
        """
        low, high = self.low, self.high
        if math.isfinite(low) and math.isfinite(high):
            middle = low / 2 + high / 2
            return middle if middle < high else low
        return min(max(0.0, low + _margin(low)), high - _margin(high))

    def ends(self) -> list[float | None]:
        """Both ends, None for infinity, as JSON has none."""
        return [end if math.isfinite(end) else None for end in (self.low, self.high)]


def _margin(end: float) -> float:
    return max(1.0, RESOLUTION * abs(end)) if math.isfinite(end) else 0.0


@dataclass(frozen=True)
class Steps:
    """A step function of all real coefficients, continuous from the right.

    Attributes:
        edges: where it steps, increasing.
        values: before, between and after the edges.
    """

    edges: Float64[Tensor, " edges"]
    values: Float64[Tensor, " edges+1"]

    def at(self, coefs: Sequence[float] | Tensor) -> Float64[Tensor, " coefficients"]:
        """The values at some coefficients."""
        points = torch.as_tensor(coefs, dtype=torch.float64)
        return self.values[torch.searchsorted(self.edges, points, right=True)]

    def best(self, low: float = -math.inf, high: float = math.inf) -> Plateau:
        """The plateau with the largest value in a range; of several the widest, then the lowest.

        Pieces narrower than `RESOLUTION` do not count, nor do differences of `ROUNDING`.

        Raises:
            UsageError: if the range has no such piece.
        """
        wide = self._wide(low, high)
        if not bool(wide.any()):
            raise UsageError(f"expected a range wider than {RESOLUTION:g}, got {low:g} to {high:g}")
        best = self.values[wide].max()
        return self._widest(_about(self.values, best), float(best), low, high)

    def least(
        self, control: Steps, threshold: float, low: float = -math.inf, high: float = math.inf
    ) -> Plateau | None:
        """The plateau with the smallest value where a control has at least a threshold.

        Of several the one with the largest control, then as in `best`; None if there is none.
        """
        own, other = joint([self, control])
        allowed = own._wide(low, high) & (other.values >= threshold)
        if not bool(allowed.any()):
            return None
        least = own.values[allowed].min()
        good = _about(own.values, least)
        good &= _about(other.values, other.values[allowed & good].max())
        return own._widest(good, float(least), low, high)

    def around(self, coef: float, least: float) -> tuple[float, float] | None:
        """The range about a coefficient with values of at least `least`; None if it has less."""
        good = self.values >= least
        piece = int(torch.searchsorted(self.edges, coef, right=True))
        if not bool(good[piece]):
            return None
        starts, ends = self._pieces(-math.inf, math.inf)
        return next(run for run in _runs(starts, ends, good, 0.0) if run[0] <= coef < run[1])

    def _wide(self, low: float, high: float) -> Bool[Tensor, " pieces"]:
        """Which pieces are wider than `RESOLUTION` within a range."""
        starts, ends = self._pieces(low, high)
        return ends - starts > RESOLUTION * _size(starts, ends)

    def _widest(
        self, good: Bool[Tensor, " pieces"], value: float, low: float, high: float
    ) -> Plateau:
        """The widest plateau of pieces of one value, then the lowest."""
        runs = list(_runs(*self._pieces(low, high), good))
        start, end = max(runs, key=lambda run: (run[1] - run[0], -run[0]))
        return Plateau(start, end, value)

    def _pieces(self, low: float, high: float) -> tuple[Tensor, Tensor]:
        """Start and end of each piece within a range; those outside have no width."""
        infinity = self.edges.new_tensor([math.inf])
        starts = torch.cat([-infinity, self.edges]).clamp(low, high)
        return starts, torch.cat([self.edges, infinity]).clamp(low, high)


def _runs(
    starts: Tensor, ends: Tensor, good: Bool[Tensor, " pieces"], wider: float = RESOLUTION
) -> Iterator[tuple[float, float]]:
    """The unions of neighbouring good pieces that are wider than so much, in order."""
    padded = F.pad(good.int(), (1, 1)).diff()
    firsts, lasts = (padded == 1).nonzero().flatten(), (padded == -1).nonzero().flatten() - 1
    lows, highs = starts[firsts], ends[lasts]
    wide = highs - lows > wider * _size(lows, highs)
    yield from zip(lows[wide].tolist(), highs[wide].tolist(), strict=True)


def _size(starts: Tensor, ends: Tensor) -> Tensor:
    """How far from 0 a range begins, at least 1, and finite."""
    return torch.minimum(starts.abs(), ends.abs()).clamp(1.0, torch.finfo(starts.dtype).max)


def _about(values: Tensor, value: Tensor) -> Bool[Tensor, " pieces"]:
    """Which values are the same up to rounding."""
    return (values - value).abs() <= ROUNDING


def joint(functions: Sequence[Steps]) -> list[Steps]:
    """The same functions, all with the edges of all of them."""
    edges = torch.cat([each.edges for each in functions]).unique()
    before = edges.new_tensor([-math.inf])
    return [Steps(edges, each.at(torch.cat([before, edges]))) for each in functions]


def weighted(functions: Sequence[Steps], weights: Sequence[float]) -> Steps:
    """The weighted sum of step functions."""
    same = joint(functions)
    total = torch.zeros_like(same[0].values)
    for weight, each in zip(weights, same, strict=True):
        total += weight * each.values
    return Steps(same[0].edges, total)
