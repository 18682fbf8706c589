r"""Coefficients of standard models: Gauss-Newton passes, or a quasi-Newton method on the true loss.

A merged model \(f(x; \theta_0 + \sum_k a_k \tau_k)\) is linearised at its current weights along the
same directions, \(f + \sum_k \delta_k J \tau_k\); \(\delta\) is solved for, damped by
\(\mu \|\delta\|^2 / K\), and taken if the true objective falls. Otherwise the damping is raised and
\(\delta\) solved again, from the same pass.

A pass costs up to 1 + 2K forward passes an image, a gradient of the true loss three, whatever K is
(four without labels, whose objectives need all logits first); `cheaper` compares. L-BFGS follows
that gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.optimize import minimize

from tangent_arithmetic.arithmetic.solving.losses import Term, cross_entropy
from tangent_arithmetic.arithmetic.solving.merged import Merged, Terms
from tangent_arithmetic.arithmetic.solving.reduced import Reduced
from tangent_arithmetic.arithmetic.solving.solver import Bounds, Objective, inside, minimum, solve

if TYPE_CHECKING:
    from jaxtyping import Float64

logger = logging.getLogger(__name__)

PASSES = 4  # of Gauss-Newton, at most
TRIES = 4  # of a pass, with more damping each
DAMPING = 1.0  # mu of the first pass
GAIN = 1e-3  # relative fall of the objective below which passes, or steps, end
GRADIENTS = 30  # of the quasi-Newton method, at most
TYPICAL = 12  # gradients until it ends: 6, 10, 12 for 8, 6, 48 coefficients (embedded suite)
Solver = Literal["gauss-newton", "quasi-newton"]


def supervised(splits: list[Reduced]) -> list[Term]:
    """The mean over splits of their cross-entropies."""
    return [Term(split, cross_entropy, 1 / len(splits)) for split in splits]


@dataclass(frozen=True)
class Route:
    """Where a solver of a standard model went.

    Attributes:
        coefficients: the point reached.
        ridge: strength of the ridge.
        history: a record of each pass: objective, what the linear model predicted, units spent.
        units: forward passes of all images.
        solver: the method.
    """

    coefficients: Float64[np.ndarray, " directions"]
    ridge: float
    history: list[dict[str, Any]]
    units: float
    solver: Solver

    def facts(self) -> dict[str, Any]:
        """All but the coefficients, for a file of results."""
        return {
            "ridge": self.ridge,
            "solver": self.solver,
            "passes": self.history,
            "forward_units": self.units,
        }


def cheaper(directions: int, passes: int = PASSES, labels: bool = True) -> Solver:
    """The solver that needs fewer forward passes: 3 + 2K a pass, three or four a gradient."""
    newton, quasi = passes * (3 + 2 * directions), (3 if labels else 4) * TYPICAL
    return "gauss-newton" if newton <= quasi else "quasi-newton"


def gauss_newton(
    model: Merged,
    centre: Float64[np.ndarray, " directions"],
    ridge: float | Callable[[list[Reduced]], float],
    terms: Terms = supervised,
    passes: int = PASSES,
    bounds: Bounds | None = None,
) -> Route:
    """Coefficients by repeated linearisation at the current weights.

    Args:
        model: the model; at the solution afterwards.
        centre: the uniform point, or the nearest within the bounds, where passes start.
        ridge: strength of the ridge towards it, or how to choose it on the first pass.
        terms: the objective on the splits.
        passes: linearisations at most.
        bounds: the least and the largest coefficient; None for none.
    """
    centre = inside(centre, bounds)
    a, history, damping = centre, list[dict[str, Any]](), DAMPING
    strength: float | None = None if callable(ridge) else ridge

    def true(point: np.ndarray) -> float:
        plain = Objective(terms(model.logits(point)), np.zeros(0)).value(np.zeros(0))
        return plain + (strength or 0.0) * float(((point - centre) ** 2).mean())

    value = true(a)
    for number in range(1, passes + 1):
        splits = model.linearise(a)
        if strength is None:
            assert callable(ridge)
            strength = ridge(splits)
            if np.isinf(strength):
                break
        before, taken = value, False
        for _ in range(TRIES):
            step, predicted = _step(terms(splits), a, centre, strength, damping, bounds)
            after = true(a + step)
            taken = after < value
            damping *= 0.25 if taken and value - after > 0.5 * (value - predicted) else 4.0
            if taken:
                a, value = a + step, after
                break
        record = {"pass": number, "objective": value, "predicted": predicted, "units": model.units}
        history.append(record)
        logger.info(
            "pass %d: objective %.4f -> %.4f, predicted %.4f", number, before, value, predicted
        )
        if not taken or before - value < GAIN * abs(before):
            break
    model.place(a)
    return Route(a, float(strength or 0.0), history, model.units, "gauss-newton")


def _step(
    terms: list[Term],
    a: np.ndarray,
    centre: np.ndarray,
    ridge: float,
    damping: float,
    bounds: Bounds | None,
) -> tuple[np.ndarray, float]:
    """The damped step of the linear model, and the objective that it predicts, undamped."""
    both, origin = ridge + damping, np.zeros(len(a))
    middle = ridge * (centre - a) / both  # where the sum of ridge and damping is least
    around = None if bounds is None else (bounds[0] - a, bounds[1] - a)
    objective = Objective(terms, middle, both)
    step = solve(objective, origin, around, rounds=1).coefficients
    step, _, _ = minimum(objective, step, bounds=around)  # with norms that vary: a true descent
    return step, Objective(terms, centre - a, ridge).value(step)


def quasi_newton(
    model: Merged,
    centre: Float64[np.ndarray, " directions"],
    ridge: float,
    gradients: int = GRADIENTS,
    bounds: Bounds | None = None,
    terms: Terms | None = None,
) -> Route:
    """Coefficients by L-BFGS-B on the true objective.

    Args:
        model: the model; at the solution afterwards.
        centre: the uniform point, or the nearest within the bounds, where the solver starts.
        ridge: strength of the ridge towards it.
        gradients: evaluations at most.
        bounds: the least and the largest coefficient; None for none.
        terms: the objective on the splits; the mean of their cross-entropies if None.
    """
    history, centre = list[dict[str, Any]](), inside(centre, bounds)
    best = (np.inf, centre)

    def function(a: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best
        value, gradient = model.value_and_gradient(a, terms)
        value += ridge * float(((a - centre) ** 2).mean())
        if value < best[0]:
            best = value, a.copy()
        history.append({"pass": len(history) + 1, "objective": value, "units": model.units})
        return value, gradient + 2 * ridge * (a - centre) / len(a)

    limits = None if bounds is None else [bounds] * len(centre)
    options = {"maxfun": gradients, "maxiter": gradients, "ftol": GAIN, "maxcor": 20}
    minimize(function, centre, jac=True, method="L-BFGS-B", bounds=limits, options=options)
    model.place(best[1])
    return Route(best[1], ridge, history, model.units, "quasi-newton")
