r"""Coefficients that minimise an objective over stored logits, by SciPy's solvers.

\[ \min_a \sum_t g_t L_t(\ell_t(a)) + \frac{r}{K} \|a - c\|^2 \]

The norm of an image's features depends on \(a\). With the norms fixed at the current point logits
are affine in \(a\), so that cross-entropy is convex and its minimum is found exactly; the norms are
then updated, and again. A round is kept only if the true objective falls, so a solution is never
worse than where it started.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import Bounds as Box
from scipy.optimize import minimize
from torch import Tensor

from tangent_arithmetic.arithmetic.solving.losses import Term
from tangent_arithmetic.runtime.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float64

logger = logging.getLogger(__name__)

ROUNDS = 6  # updates of the norms
STEPS = 500  # of a solver in a round
HALVINGS = 4  # of a step after which the true objective has not fallen
SMALL = 1e-5  # change of the coefficients at which the norms need no update
PRECISION = 1e-8  # norm of the gradient at the minimum
SAMPLE = 4096  # images of all terms on which a solver with more images begins
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
        self, a: Float64[np.ndarray, " directions"], norms: Sequence[Tensor]
    ) -> Float64[np.ndarray, "directions directions"]:
        """The Hessian, if all terms are convex."""
        total = 2 * self.ridge / len(a) * np.eye(len(a))
        for term, own in zip(self.terms, norms, strict=True):
            total = total + term.curvature(a, own)
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
    a = _inside(objective.centre if math.isinf(objective.ridge) else start, bounds)
    best = first = objective.value(a)
    if not math.isfinite(best):
        raise UsageError("the objective is not finite where the solver starts; check the weights")
    if math.isinf(objective.ridge) or rounds < 1:
        return Solution(a, best, first, 0.0, None, 0, 0)
    difference, gradient, done, evaluations = 0.0, None, 0, 0
    begin = _sampled(objective, a, bounds)
    for _ in range(rounds):
        norms = objective.norms(a)
        found, slope, count = minimum(objective, a if done else begin, norms, bounds)
        evaluations += count
        value = objective.value(found)
        for _ in range(HALVINGS):  # the norms may have moved far
            if value < best:
                break
            found = (a + found) / 2
            value = objective.value(found)
        if value >= best - 1e-12 * abs(best):
            break
        moved = float(np.abs(found - a).max())
        difference, gradient = objective.value(found, norms) - value, slope
        a, best, done = found, value, done + 1
        if moved < SMALL or all(term.reduced.root is None for term in objective.terms):
            break
    return Solution(a, best, first, difference, gradient, done, evaluations)


def _sampled(
    objective: Objective, a: np.ndarray, bounds: Bounds | None
) -> Float64[np.ndarray, " directions"]:
    """The minimum on a sample of many images, a start near that on all; else the point itself."""
    step = sum(len(term.reduced) for term in objective.terms) // SAMPLE
    if step < 2 or any(len(term.reduced) < step for term in objective.terms):
        return a
    sample = replace(objective, terms=[term.every(step) for term in objective.terms])
    return minimum(sample, a, sample.norms(a), bounds)[0]


def minimum(
    objective: Objective,
    start: Float64[np.ndarray, " directions"],
    norms: Sequence[Tensor] | None = None,
    bounds: Bounds | None = None,
) -> tuple[Float64[np.ndarray, " directions"], float, int]:
    """The minimum of an objective, with fixed norms or, if None, the true one (a local minimum).

    Newton's method in a trust region where the objective is convex and there are no bounds, else
    L-BFGS-B.

    Returns:
        The point, the norm of the (projected) gradient there, and the number of evaluations.
    """
    count = 0

    def function(a: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal count
        count += 1
        return objective.value_and_gradient(a, norms)

    convex = norms is not None and all(term.convex for term in objective.terms)
    if convex and bounds is None:
        assert norms is not None
        fixed = norms
        found = minimize(
            function,
            start,
            jac=True,
            hess=lambda a: objective.curvature(a, fixed),
            method="trust-exact",
            options={"gtol": PRECISION, "maxiter": STEPS},
        )
    else:
        found = minimize(
            function,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=None if bounds is None else Box(*np.broadcast_arrays(*bounds, start)[:2]),
            options={"gtol": PRECISION, "ftol": 0.0, "maxiter": STEPS, "maxcor": 30},
        )
    return found.x, _projected(found.x, found.jac, bounds), count


def _projected(a: np.ndarray, gradient: np.ndarray, bounds: Bounds | None) -> float:
    """The norm of a gradient without its components that point out of the bounds."""
    if bounds is not None:
        low, high = bounds
        stuck = ((a <= low) & (gradient > 0)) | ((a >= high) & (gradient < 0))
        gradient = np.where(stuck, 0.0, gradient)
    return float(np.linalg.norm(gradient))


def _inside(a: np.ndarray, bounds: Bounds | None) -> Float64[np.ndarray, " directions"]:
    a = np.asarray(a, dtype=np.float64)
    return a if bounds is None else np.clip(a, *bounds)


def with_ridge(objective: Objective, ridge: float) -> Objective:
    """The same objective with another ridge."""
    return replace(objective, ridge=ridge)
