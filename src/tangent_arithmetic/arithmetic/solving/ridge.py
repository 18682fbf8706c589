r"""The strength of the ridge, by cross-validation on the images that coefficients are solved on.

For each fold coefficients are solved on the other folds, from the strongest ridge to the weakest,
each starting at the last; the strength with the lowest mean loss on images left out is taken. The
strongest is infinite, the uniform coefficient itself. Norms are fixed at the uniform point.

Of many images a sample chooses. The ridge is a prior on the coefficients, which the losses of more
images outweigh: strength r on a share s of the images is the prior that s r is on all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tangent_arithmetic.arithmetic.solving.losses import Term, thinned
from tangent_arithmetic.arithmetic.solving.newton import newton
from tangent_arithmetic.arithmetic.solving.solver import (
    SAMPLE,
    Bounds,
    Objective,
    Solution,
    inside,
    minimum,
    solve,
)
from tangent_arithmetic.runtime.logs import progress

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64

RIDGES = (math.inf, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.0)
FOLDS = 5
ROUGH = 1e-3  # norm of the gradient at the solutions of folds
NEAR = 0.05  # change of the coefficients in which their Hessian is used again


@dataclass(frozen=True)
class Validated:
    """A solution with the ridge that cross-validation has chosen.

    Attributes:
        solution: on all images.
        ridge: the strength on all images.
        table: (strength, mean loss on images left out, its standard error over folds), strongest
            first; empty if the strength was given.
        share: of the images that chose; strengths in the table times it are those on all images.
    """

    solution: Solution
    ridge: float
    table: list[tuple[float, float, float]]
    share: float = 1.0

    def facts(self) -> dict[str, Any]:
        """The choice, for a file of results; an infinite strength is the text "inf"."""
        rows = [{"ridge": _named(r), "loss": m, "error": e} for r, m, e in self.table]
        chosen = {"ridge": _named(self.ridge), "cross_validation": rows, "share": self.share}
        return {**chosen, **self.solution.facts()}


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
        centre: the uniform point; where it is out of the bounds, the nearest point within.
        ridges: strengths to choose from.
        folds: number of folds; fewer if a split has fewer images.
        seed: of the folds.
        bounds: the least and the largest coefficient; None for none.
    """
    ridges, centre = sorted(ridges, reverse=True), inside(centre, bounds)
    sample = thinned(terms, SAMPLE) or list(terms)
    share = sum(len(t.reduced) for t in sample) / sum(len(t.reduced) for t in terms)
    folds = min(folds, *(len(term.reduced) for term in sample))
    if folds > 1:
        losses = _losses(sample, centre, ridges, folds, seed, bounds)
    else:  # a single image: nothing to choose by
        losses = np.zeros((2, len(ridges)))
    means, errors = losses.mean(axis=0), losses.std(axis=0, ddof=1) / math.sqrt(folds)
    ridge = share * ridges[int(means.argmin())]
    solution = solve(Objective(terms, centre, ridge), centre, bounds)
    table = [(r, float(m), float(e)) for r, m, e in zip(ridges, means, errors, strict=True)]
    return Validated(solution, ridge, table, share)


def _losses(
    terms: Sequence[Term],
    centre: np.ndarray,
    ridges: Sequence[float],
    folds: int,
    seed: int,
    bounds: Bounds | None,
) -> Float64[np.ndarray, "folds ridges"]:
    """The loss on the images of each fold, solved on the others, at each strength."""
    norms = [term.reduced.norms(centre) for term in terms]
    plain = [term.rootless() for term in terms]
    parts = [torch.from_numpy(fold_of(np.asarray(t.reduced.labels), folds, seed)) for t in terms]

    def objective(chosen: Sequence[Tensor]) -> tuple[Objective, list[Tensor]]:
        """The objective on some of the images, and their norms."""
        some = [term.on(images) for term, images in zip(plain, chosen, strict=True)]
        return Objective(some, centre), [n[i] for n, i in zip(norms, chosen, strict=True)]

    losses = np.empty((folds, len(ridges)))
    for fold in progress(range(folds), "cross-validation of the ridge", folds):
        kept = objective([torch.nonzero(part != fold)[:, 0] for part in parts])
        held = objective([torch.nonzero(part == fold)[:, 0] for part in parts])
        path = _path(*kept, ridges, bounds)
        losses[fold] = [held[0].value(a, held[1]) for a in path]
    return losses


def _path(
    objective: Objective, norms: Sequence[Tensor], ridges: Sequence[float], bounds: Bounds | None
) -> list[Float64[np.ndarray, " directions"]]:
    """The minimum at each strength, which starts at the last one."""
    points, losses = [objective.centre], _Remembered(objective, norms)
    for ridge in ridges:
        a = points[-1]
        if math.isfinite(ridge) and objective.convex and bounds is None:
            pull = Objective([], objective.centre, ridge)
            a, _ = newton(partial(losses.plus, pull), partial(losses.curved, pull), a, ROUGH)
        elif math.isfinite(ridge):
            a, _, _ = minimum(replace(objective, ridge=ridge), a, norms, bounds, ROUGH)
        points.append(a)
    return points[1:]


@dataclass
class _Remembered:
    """A convex objective without its ridge, whose values a path of strengths shares.

    Attributes:
        objective: the objective, without a ridge.
        norms: of the images' features, by term.
    """

    objective: Objective
    norms: Sequence[Tensor]
    last: tuple[np.ndarray, float, np.ndarray] | None = None  # a point, the value, the gradient
    hessian: tuple[np.ndarray, np.ndarray] | None = None  # a point, the Hessian there

    def plus(self, pull: Objective, a: np.ndarray) -> tuple[float, np.ndarray]:
        """The value and the gradient at a point, with a ridge."""
        if self.last is None or not np.array_equal(self.last[0], a):
            self.last = a, *self.objective.value_and_gradient(a, self.norms)
        value, gradient = pull.value_and_gradient(a)
        return self.last[1] + value, self.last[2] + gradient

    def curved(self, pull: Objective, a: np.ndarray) -> np.ndarray:
        """The Hessian at a point or one near it, with a ridge."""
        if self.hessian is None or np.abs(self.hessian[0] - a).max() > NEAR:
            self.hessian = a, self.objective.curvature(a, self.norms)
        total: np.ndarray = self.hessian[1] + pull.curvature(a, [])
        return total


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
