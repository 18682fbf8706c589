r"""The strength of the ridge, by cross-validation on the images that coefficients are solved on.

For each fold coefficients are solved on the other folds, from the strongest ridge to the weakest,
each starting at the last; the strength with the lowest mean loss on images left out is taken. The
strongest is infinite, the uniform coefficient itself. Norms are fixed at the uniform point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tangent_arithmetic.arithmetic.solving.losses import Term
from tangent_arithmetic.arithmetic.solving.solver import Bounds, Objective, Solution, minimum, solve
from tangent_arithmetic.runtime.logs import progress

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64

RIDGES = (math.inf, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.0)
FOLDS = 5


@dataclass(frozen=True)
class Validated:
    """A solution with the ridge that cross-validation has chosen.

    Attributes:
        solution: on all images.
        ridge: the strength.
        table: (strength, mean loss on images left out, its standard error over folds), strongest
            first.
    """

    solution: Solution
    ridge: float
    table: list[tuple[float, float, float]]

    def facts(self) -> dict[str, Any]:
        """The choice, for a file of results; an infinite strength is the text "inf"."""
        rows = [{"ridge": _named(r), "loss": m, "error": e} for r, m, e in self.table]
        return {"ridge": _named(self.ridge), "cross_validation": rows, **self.solution.facts()}


def _named(ridge: float) -> float | str:
    return "inf" if math.isinf(ridge) else ridge


def cross_validated(
    terms: Sequence[Term],
    centre: Float64[np.ndarray, " directions"],
    ridges: Sequence[float] = RIDGES,
    folds: int = FOLDS,
    seed: int = 0,
    bounds: Bounds | None = None,
) -> Validated:
    """The solution with the ridge that cross-validation chooses.

    Args:
        terms: losses on labelled images.
        centre: the uniform point.
        ridges: strengths to choose from.
        folds: number of folds; fewer if a split has fewer images.
        seed: of the folds.
        bounds: the least and the largest coefficient; None for none.
    """
    ridges = sorted(ridges, reverse=True)
    folds = min(folds, *(len(term.reduced) for term in terms))
    losses = np.empty((folds, len(ridges)))
    if folds > 1:
        parts = [fold_of(np.asarray(t.reduced.labels), folds, seed) for t in terms]
        for fold in progress(range(folds), "cross-validation of the ridge", folds):
            left_out = [torch.from_numpy(part == fold) for part in parts]
            losses[fold] = _path(terms, left_out, centre, ridges, bounds)
        means = losses.mean(axis=0)
        errors = losses.std(axis=0, ddof=1) / math.sqrt(folds)
    else:  # a single image: nothing to choose by
        means, errors = np.zeros(len(ridges)), np.zeros(len(ridges))
    ridge = ridges[int(means.argmin())]
    start = np.asarray(centre, dtype=np.float64)
    solution = solve(Objective(terms, start, ridge), start, bounds)
    table = [(r, float(m), float(e)) for r, m, e in zip(ridges, means, errors, strict=True)]
    return Validated(solution, ridge, table)


def _path(
    terms: Sequence[Term],
    left_out: Sequence[torch.Tensor],
    centre: np.ndarray,
    ridges: Sequence[float],
    bounds: Bounds | None,
) -> list[float]:
    """The loss on images left out at each strength, solved on the others."""
    kept = [term.on(~out) for term, out in zip(terms, left_out, strict=True)]
    rest = [term.on(out) for term, out in zip(terms, left_out, strict=True)]
    objective = Objective(kept, centre)
    norms, a, losses = objective.norms(centre), centre, []
    held = Objective(rest, centre)
    for ridge in ridges:
        if math.isfinite(ridge):
            a, _, _ = minimum(replace(objective, ridge=ridge), a, norms, bounds)
        losses.append(held.value(a, norms))
    return losses


def fold_of(labels: np.ndarray, folds: int, seed: int) -> Int64[np.ndarray, " images"]:
    """The fold of each image; every fold has its share of each class, up to one image.

    Args:
        labels: (images,), or zeros and ones (images, classes).
        folds: number of folds.
        seed: of the order within a class.
    """
    order = np.random.default_rng([seed, 23]).permutation(len(labels))
    _, kinds = np.unique(labels, axis=0, return_inverse=True)  # classes, or sets of them
    ranked = order[np.argsort(kinds.reshape(-1)[order], kind="stable")]
    found = np.empty(len(labels), dtype=np.int64)
    found[ranked] = np.arange(len(labels)) % folds
    return found
