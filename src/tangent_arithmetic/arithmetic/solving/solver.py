r"""Coefficients that minimise an objective over stored logits.

\[ \min_a \sum_t g_t L_t(\ell_t(a)) + \frac{r}{K} \|a - c\|^2 \]

The norm of an image's features depends on \(a\). With the norms fixed at the current point logits
are affine in \(a\), so that cross-entropy is convex and its minimum is found exactly; the norms are
then updated, and again. A round is kept only if the true objective falls, so a solution is never
worse than where it started. Of many images, rounds on a sample settle the norms, and one round on
all of them follows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import Bounds as Box
from scipy.optimize import minimize
from torch import Tensor

from tangent_arithmetic.arithmetic.solving.losses import Term, thinned
from tangent_arithmetic.arithmetic.solving.newton import newton
from tangent_arithmetic.runtime.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float64

logger = logging.getLogger(__name__)

ROUNDS = 6  # updates of the norms
STEPS = 500  # of a solver in a round
QUARTERS = 2  # times that a step is shortened after which the true objective has not fallen
SMALL = 1e-4  # change of the coefficients at which the norms need no update
PRECISION = 1e-7  # norm of the gradient at the minimum
LEAST = 1e-9  # relative fall of the objective below which rounds end
SAMPLE = 2048  # images of all terms on which a solver with many more begins
Bounds = tuple[Any, Any]  # least and largest coefficient: numbers, or one of each direction


@dataclass(frozen=True)
class Objective:
    """A sum of terms, and a ridge.

    Attributes:
        terms: losses on splits.
        centre: c, where the ridge is zero.
        ridge: r; infinite for c itself.
    """

    terms: Sequence[Term]
    centre: Float64[np.ndarray, " directions"]
    ridge: float = 0.0

    @property
    def images(self) -> int:
        """The number of images of all terms."""
        return sum(len(term.reduced) for term in self.terms)

    @property
    def convex(self) -> bool:
        """Whether the objective is convex with fixed norms, and has a `curvature`."""
        return all(term.convex for term in self.terms)

    def norms(self, a: Float64[np.ndarray, " directions"]) -> list[Tensor]:
        """The norms of all images' features at a point, by term."""
        return [term.reduced.norms(a) for term in self.terms]

    def penalty(self, a: Float64[np.ndarray, " directions"]) -> float:
        """The ridge at a point."""
        away = float(((a - self.centre) ** 2).mean()) if self.ridge else 0.0
        return self.ridge * away if away else 0.0

    def value(
        self, a: Float64[np.ndarray, " directions"], norms: Sequence[Tensor] | None = None
    ) -> float:
        """The objective; norms are those at the point if None."""
        fixed = [None] * len(self.terms) if norms is None else norms
        values = [term.value(a, n) for term, n in zip(self.terms, fixed, strict=True)]
        return sum(values) + self.penalty(a)

    def value_and_gradient(
        self, a: Float64[np.ndarray, " directions"], norms: Sequence[Tensor] | None = None
    ) -> tuple[float, Float64[np.ndarray, " directions"]]:
        """The objective and its gradient; the norms vary with the point if None."""
        fixed = [None] * len(self.terms) if norms is None else norms
        value, gradient = self.penalty(a), 2 * self.ridge * (a - self.centre) / len(a)
        for term, own in zip(self.terms, fixed, strict=True):
            part, pulled = term.value_and_gradient(a, own)
            value, gradient = value + part, gradient + pulled
        return value, gradient

    def curvature(
        self, a: Float64[np.ndarray, " directions"], norms: Sequence[Tensor], step: int = 1
    ) -> Float64[np.ndarray, "directions directions"]:
        """The Hessian with fixed norms, if the objective is convex, of every `step`-th image."""
        total, some = 2 * self.ridge / len(a) * np.eye(len(a)), slice(None, None, step)
        for term, own in zip(self.terms, norms, strict=True):
            total = total + term.on(some).curvature(a, own[some])
        return np.asarray(total)


@dataclass(frozen=True)
class Solution:
    """A solved point.

    Attributes:
        coefficients: a.
        objective: the true objective there, with the ridge.
        start: the true objective where the solver started.
        difference: of the objective with fixed norms from the true one, at the end.
        gradient: norm of the gradient of the objective that was minimised, at its minimum (of the
            last round that was kept); projected on the bounds. None if no round was kept.
        rounds: updates of the norms.
        evaluations: of the objective and its gradient.
    """

    coefficients: Float64[np.ndarray, " directions"]
    objective: float
    start: float
    difference: float
    gradient: float | None
    rounds: int
    evaluations: int

    def facts(self) -> dict[str, Any]:
        """All but the coefficients, for a file of results."""
        return {n: v for n, v in asdict(self).items() if n != "coefficients"}


def solve(
    objective: Objective,
    start: Float64[np.ndarray, " directions"],
    bounds: Bounds | None = None,
    rounds: int = ROUNDS,
) -> Solution:
    """The point that minimises an objective, from rounds with fixed norms.

    Args:
        objective: the objective.
        start: where to start.
        bounds: the least and the largest coefficient; None for none.
        rounds: updates of the norms at most.

    Raises:
        UsageError: if the objective is not finite at the start.
    """
    a = inside(objective.centre if math.isinf(objective.ridge) else start, bounds)
    norms = objective.norms(a)
    best = first = objective.value(a, norms)
    if not math.isfinite(best):
        raise UsageError("the objective is not finite where the solver starts; check the weights")
    if math.isinf(objective.ridge) or rounds < 1:
        return Solution(a, best, first, 0.0, None, 0, 0)
    difference, gradient, done, evaluations = 0.0, None, 0, 0
    if sample := thinned(objective.terms, SAMPLE):
        begin = solve(replace(objective, terms=sample), a, bounds, rounds).coefficients
        there = objective.norms(begin)
        if (value := objective.value(begin, there)) < best:
            a, best, norms, rounds = begin, value, there, 1  # the sample has settled the norms
    for _ in range(rounds):
        found, slope, count = minimum(objective, a, norms, bounds)
        evaluations += count
        found, value, ahead = _shortened(objective, a, found, best)
        if value >= best - LEAST * abs(best):
            break
        moved = float(np.abs(found - a).max())
        difference, gradient = objective.value(found, norms) - value, slope
        a, best, norms, done = found, value, ahead, done + 1
        if moved < SMALL or all(term.reduced.root is None for term in objective.terms):
            break
    return Solution(a, best, first, difference, gradient, done, evaluations)


def _shortened(
    objective: Objective, a: np.ndarray, found: np.ndarray, best: float
) -> tuple[np.ndarray, float, list[Tensor]]:
    """A step to a minimum with fixed norms, quartered while the true objective is not below `best`.

    Returns:
        The point, the true objective and the norms there.
    """
    for share in 0.25 ** np.arange(1 + QUARTERS):  # the norms may have moved far
        point = a + share * (found - a)
        norms = objective.norms(point)
        value = objective.value(point, norms)
        if value < best:
            break
    return point, value, norms


def minimum(
    objective: Objective,
    start: Float64[np.ndarray, " directions"],
    norms: Sequence[Tensor] | None = None,
    bounds: Bounds | None = None,
    precision: float = PRECISION,
) -> tuple[Float64[np.ndarray, " directions"], float, int]:
    """The minimum of an objective, with fixed norms or, if None, the true one (a local minimum).

    Newton's method where the objective is convex and there are no bounds, with the Hessian of a
    sample of many images; else L-BFGS-B.

    Args:
        objective: the objective.
        start: where to start.
        norms: of the images' features, by term.
        bounds: the least and the largest coefficient; None for none.
        precision: norm of the gradient at which a solver stops; of n times `SAMPLE` images n times
            as much.

    Returns:
        The point, the norm of the (projected) gradient there, and the number of evaluations.
    """
    count = 0

    def function(a: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal count
        count += 1
        return objective.value_and_gradient(a, norms)

    if objective.convex and norms is not None and bounds is None:
        step = max(1, objective.images // SAMPLE)
        hessian = partial(objective.curvature, norms=norms, step=step)
        a, slope = newton(function, hessian, start, step * precision)
        return a, float(np.linalg.norm(slope)), count
    box = None if bounds is None else Box(*np.broadcast_arrays(*bounds, start)[:2])
    options = {"gtol": precision, "ftol": 0.0, "maxiter": STEPS, "maxcor": 30}
    found = minimize(function, start, jac=True, method="L-BFGS-B", bounds=box, options=options)
    return found.x, _projected(found.x, found.jac, bounds), count


def _projected(a: np.ndarray, gradient: np.ndarray, bounds: Bounds | None) -> float:
    """The norm of a gradient without its components that point out of the bounds."""
    if bounds is not None:
        low, high = bounds
        stuck = ((a <= low) & (gradient > 0)) | ((a >= high) & (gradient < 0))
        gradient = np.where(stuck, 0.0, gradient)
    return float(np.linalg.norm(gradient))


def inside(a: np.ndarray, bounds: Bounds | None) -> Float64[np.ndarray, " directions"]:
    """The nearest point within the bounds."""
    a = np.asarray(a, dtype=np.float64)
    return a if bounds is None else np.clip(a, *bounds)
