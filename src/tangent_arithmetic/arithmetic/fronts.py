r"""Fronts: what is given up on one task for another, by solving for the coefficients.

For weights w on the simplex, a point of the front is

\[ a(w) = \arg\min_a \sum_t w_t L_t(a) \]

with \(L_t\) the cross-entropy of the linear model on the labelled images of task t. Where a
weighted sum is least, no task improves unless another one gets worse. For heads that do not
normalise the sum is convex, and a point is its global minimum. Others divide by the norm of the
features, which depends on a: the sum is solved with fixed norms in rounds, then with moving ones,
for a local minimum (`arithmetic/solving/solver.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from tangent_arithmetic.arithmetic.solving.losses import Term, cross_entropy
from tangent_arithmetic.arithmetic.solving.reduced import Reduced
from tangent_arithmetic.arithmetic.solving.solver import Objective, minimum, solve
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.runtime.logs import progress

if TYPE_CHECKING:
    from jaxtyping import Float64

SMALLEST_RIDGE = 1e-6  # of a vertex, whose loss may have no minimum where images are separable


@dataclass(frozen=True)
class Front:
    """Solved coefficients for weights of the tasks, in order of the weights.

    Attributes:
        tasks: the tasks.
        weights: of the tasks, with sum 1.
        coefficients: solved for each.
        losses: the cross-entropy of each task there, on the images that were solved on.
        accuracies: on the images to report on.
    """

    tasks: tuple[str, ...]
    weights: Float64[np.ndarray, "points tasks"]
    coefficients: Float64[np.ndarray, "points directions"]
    losses: Float64[np.ndarray, "points tasks"]
    accuracies: Float64[np.ndarray, "points tasks"]

    def records(self) -> list[dict[str, float]]:
        """A row a point: "weight X", "loss X" and "accuracy X" for each task X."""
        parts = {"weight": self.weights, "loss": self.losses, "accuracy": self.accuracies}
        return [
            {f"{kind} {task}": float(v[i, t]) for kind, v in parts.items()
             for t, task in enumerate(self.tasks)}
            for i in range(len(self.weights))
        ]  # fmt: skip

    def efficient(self) -> list[int]:
        """The points whose accuracies no other point of the front matches or exceeds in all tasks.

        Of points with the same accuracies all are kept.
        """
        others, own = self.accuracies[None], self.accuracies[:, None]
        beaten = np.all(others >= own, axis=2) & np.any(others > own, axis=2)
        return [int(i) for i in np.flatnonzero(~np.any(beaten, axis=1))]


def simplex(tasks: int, divisions: int) -> Float64[np.ndarray, "points tasks"]:
    """All weights that are multiples of 1 / divisions and sum to 1, first tasks first.

    There are (divisions + tasks - 1) over (tasks - 1) of them.

    Raises:
        UsageError: without tasks or divisions.
    """
    if tasks < 1 or divisions < 1:
        raise UsageError(f"expected at least one task and division, got {tasks} and {divisions}")
    slots = divisions + tasks - 1
    chosen = list(combinations(range(slots), tasks - 1))
    bars = np.array(chosen, dtype=np.int64).reshape(len(chosen), tasks - 1)
    first, last = np.full((len(bars), 1), -1), np.full((len(bars), 1), slots)
    counts = np.diff(np.concatenate([first, bars, last], axis=1), axis=1) - 1
    weights: np.ndarray = counts[::-1] / divisions
    return weights


def front(
    splits: Sequence[Reduced],
    weights: Float64[np.ndarray, "points tasks"],
    start: Float64[np.ndarray, " directions"],
    report: Sequence[Reduced] | None = None,
    ridge: float = SMALLEST_RIDGE,
) -> Front:
    """Solves for the coefficients at each of the weights, from the nearest one solved before.

    Args:
        splits: one a task, with labels: the images to solve on.
        weights: of the tasks, not negative, with sum 1, see `simplex`.
        start: coefficients to start from, and the centre of the ridge.
        report: the images to report accuracies on, one a task; None for those of `splits`.
        ridge: of the coefficients towards `start`.

    Raises:
        UsageError: for weights that are not on the simplex.
    """
    if weights.shape[1:] != (len(splits),):
        raise UsageError(f"expected a weight for each of {len(splits)} tasks, got {weights.shape}")
    if (weights < 0).any() or not np.allclose(weights.sum(axis=1), 1):
        raise UsageError("expected weights that are not negative and sum to 1; see `simplex`")
    found: list[np.ndarray] = []
    for i in progress(range(len(weights)), "points of the front", len(weights)):
        near = np.abs(weights[:i] - weights[i]).sum(axis=1)
        begin = found[int(near.argmin())] if found else start
        found.append(_point(splits, weights[i], begin, start, ridge))
    coefficients = np.stack(found)
    plain = [Term(split, cross_entropy) for split in splits]
    losses = np.array([[term.value(a, None) for term in plain] for a in found])
    shown = splits if report is None else report
    accuracies = np.array([[split.accuracy(a) for split in shown] for a in found])
    names = tuple(split.name.removesuffix("Val") for split in splits)
    return Front(names, weights, coefficients, losses, accuracies)


def _point(
    splits: Sequence[Reduced],
    weights: Float64[np.ndarray, " tasks"],
    begin: Float64[np.ndarray, " directions"],
    centre: Float64[np.ndarray, " directions"],
    ridge: float,
) -> Float64[np.ndarray, " directions"]:
    """The coefficients that minimise the weighted mean; tasks of no weight are left out."""
    terms = [
        Term(split, cross_entropy, float(weight))
        for split, weight in zip(splits, weights, strict=True)
        if weight > 0
    ]
    objective = Objective(terms, centre, ridge)
    coarse = solve(objective, begin).coefficients
    fine = minimum(objective, coarse)[0]  # of the true objective, whose norms move
    return fine if objective.value(fine) <= objective.value(coarse) else coarse
