r"""Negation with a coefficient for each group, under a condition on a control set.

For weights \(\mu\) of the control set

\[ a_\mu = \arg\min_a\; \frac1n \sum_i p_{i,y_i}(a) + \mu\, CE_{control}(a) + \frac{r}{K} \|a\|^2 \]

is solved, and \(s\, a_\mu\) is measured for factors s. All these points, and those of one
coefficient for all directions, make the front of forgetting against control. The point with the
lowest accuracy on the task among those that keep the control set is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tangent_arithmetic.arithmetic.coefficients import least_kept
from tangent_arithmetic.arithmetic.solving.losses import Term, cross_entropy, true_class
from tangent_arithmetic.arithmetic.solving.reduced import Reduced
from tangent_arithmetic.arithmetic.solving.solver import Bounds, Objective, inside, minimum
from tangent_arithmetic.runtime.logs import progress

if TYPE_CHECKING:
    from jaxtyping import Float64

WEIGHTS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
FACTORS = tuple(round(0.3 + 0.05 * i, 2) for i in range(27))  # 0.3 to 1.6
UNIFORM = tuple(round(0.05 * i, 2) for i in range(121))  # 0 to 6
RIDGE = 3e-4  # chosen on validation, embedded suite


@dataclass(frozen=True)
class Forgetting:
    """A point of the front.

    Attributes:
        coefficients: of the directions; negative to forget.
        task: accuracy on the task.
        control: accuracy on the control set.
        weight: of the control set in the objective; None for one coefficient for all directions.
        factor: that the solution was scaled by.
    """

    coefficients: Float64[np.ndarray, " directions"]
    task: float
    control: float
    weight: float | None
    factor: float


@dataclass(frozen=True)
class Front:
    """All measured points.

    Attributes:
        points: the points.
        least: lowest acceptable accuracy on the control set.
    """

    points: list[Forgetting]
    least: float

    def best(self, one: bool = False) -> Forgetting:
        """The point with the lowest accuracy on the task that keeps the control set.

        Ties go to the higher control accuracy, then to the smaller coefficients. Where no point
        qualifies it is that with the highest control accuracy.

        Args:
            one: only points with one coefficient for all directions.
        """
        points = [p for p in self.points if p.weight is None or not one]
        kept = [p for p in points if p.control >= self.least]
        if not kept:
            return max(points, key=lambda p: p.control)
        return min(kept, key=lambda p: (p.task, -p.control, float(np.abs(p.coefficients).sum())))

    def frontier(self) -> list[Forgetting]:
        """The points that no other one beats in both, by falling control accuracy."""
        kept: list[Forgetting] = []
        for point in sorted(self.points, key=lambda p: (-p.control, p.task)):
            if not kept or point.task < kept[-1].task:
                kept.append(point)
        return kept


def forget(
    task: Reduced,
    control: Reduced,
    share: float,
    weights: Sequence[float] = WEIGHTS,
    factors: Sequence[float] = FACTORS,
    uniform: Sequence[float] = UNIFORM,
    bounds: Bounds | None = None,
) -> Front:
    """The front of forgetting a task against keeping a control set.

    Args:
        task: labelled images of the task, along the directions of its vector.
        control: labelled images of the control set, along the same directions.
        share: of the accuracy at zero that the control set must keep.
        weights: of the control set in the objective.
        factors: to scale solutions by.
        uniform: coefficients for all directions; they are negated.
        bounds: the least and the largest coefficient; None for none.
    """
    count = len(task.steps)
    zero = np.zeros(count)
    least = least_kept(share, control.accuracy(zero))

    def measured(a: np.ndarray, weight: float | None, factor: float) -> Forgetting:
        point = factor * a
        return Forgetting(point, task.accuracy(point), control.accuracy(point), weight, factor)

    def allowed(a: float | np.ndarray) -> bool:
        return bounds is None or bool(np.all((a >= bounds[0]) & (a <= bounds[1])))

    points = [measured(np.full(count, -1.0), None, c) for c in uniform if allowed(-c)]
    start = Front(points, least).best().coefficients if points else inside(zero, bounds)
    for weight in progress(weights, f"forgetting {task.name}"):
        terms = [Term(task, true_class), Term(control, cross_entropy, weight)]
        a, _, _ = minimum(Objective(terms, zero, RIDGE), start, bounds=bounds)
        points += [measured(a, weight, factor) for factor in factors if allowed(factor * a)]
    return Front(points, least)
