"""Solved coefficients of a model's directions, from splits to a point, and its accuracies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tangent_arithmetic.arithmetic.features import linear_features
from tangent_arithmetic.arithmetic.metrics import main_of
from tangent_arithmetic.arithmetic.solving.groups import along
from tangent_arithmetic.arithmetic.solving.losses import Term, cross_entropy
from tangent_arithmetic.arithmetic.solving.merged import Merged
from tangent_arithmetic.arithmetic.solving.reduced import Reduced, reduce
from tangent_arithmetic.arithmetic.solving.ridge import Validated, cross_validated
from tangent_arithmetic.arithmetic.solving.solver import Bounds, Objective, inside, solve
from tangent_arithmetic.arithmetic.solving.standard import (
    PASSES,
    Solver,
    cheaper,
    gauss_newton,
    quasi_newton,
    supervised,
)
from tangent_arithmetic.arithmetic.solving.unlabelled import (
    PUBLISHED,
    Guards,
    Rule,
    adamerging,
    self_labels,
    uniform_without_labels,
    unlabelled_terms,
    without_labels,
)
from tangent_arithmetic.arithmetic.sweeps import Split
from tangent_arithmetic.arithmetic.tally import measured
from tangent_arithmetic.encoders.base import Encoder, LinearEncoder, ModuleEncoder, is_linear
from tangent_arithmetic.runtime.compute import Compute
from tangent_arithmetic.runtime.errors import UsageError
from tangent_arithmetic.storage.statedict import State, move

if TYPE_CHECKING:
    from jaxtyping import Float64

RIDGE = 0.1  # where none is given and none can be cross-validated


@dataclass(frozen=True)
class Settings:
    """How coefficients are solved for.

    Attributes:
        ridge: strength of the ridge towards the uniform coefficient; None to cross-validate it.
        bounds: the least and the largest coefficient; None for none.
        rule: how, without labels; None for labels.
        guards: of a solution without labels.
        solver: of standard models; None for the cheaper one.
        passes: linearisations of a standard model at most.
        seed: of folds and batches.
        folder: where large arrays are mapped; None to hold all in memory.
    """

    ridge: float | None = None
    bounds: Bounds | None = None
    rule: Rule | None = None
    guards: Guards = field(default_factory=Guards)
    solver: Solver | None = None
    passes: int = PASSES
    seed: int = 0
    folder: Path | None = None

    def guarded(self) -> Guards:
        """The guards of a solution without labels, with the ridge and the bounds."""
        ridge = self.guards.ridge if self.ridge is None else self.ridge
        return replace(self.guards, ridge=ridge, bounds=self.bounds or self.guards.bounds)


@dataclass(frozen=True)
class Combination:
    """Solved coefficients.

    Attributes:
        coefficients: of the directions.
        uniform: the coefficient for all directions that the ridge pulls towards.
        facts: how they were solved for.
        others: further points, by name.
    """

    coefficients: Float64[np.ndarray, " directions"]
    uniform: float
    facts: dict[str, Any]
    others: dict[str, Float64[np.ndarray, " directions"]] = field(default_factory=dict)


def best_uniform(
    encoder: Encoder, tau: State, splits: Sequence[Split], coefs: Sequence[float]
) -> float:
    """The smallest coefficient of a vector with the best mean accuracy on the splits."""
    swept = np.asarray([split.sweep(encoder, tau, coefs) for split in splits])
    return float(coefs[int(swept.mean(axis=0).argmax())])


def combine_linear(splits: Sequence[Reduced], uniform: float, settings: Settings) -> Combination:
    """Solved coefficients of a linear model.

    Args:
        splits: the images along the directions.
        uniform: the best coefficient for all directions; without labels it is not used.
        settings: how to solve.
    """
    count = len(splits[0].steps)
    if settings.rule is not None:
        return _unlabelled(splits, settings)
    centre = inside(np.full(count, uniform), settings.bounds)
    terms, ridge = supervised(list(splits)), settings.ridge
    if ridge is None:
        found = cross_validated(terms, centre, seed=settings.seed, bounds=settings.bounds)
    else:
        solution = solve(Objective(terms, centre, ridge), centre, settings.bounds)
        found = Validated(solution, ridge, [])
    return Combination(found.solution.coefficients, uniform, found.facts())


def _unlabelled(splits: Sequence[Reduced], settings: Settings) -> Combination:
    """Without labels, and AdaMerging's published rule on the same coefficients."""
    assert settings.rule is not None
    guards, count = settings.guarded(), len(splits[0].steps)
    grid = [round(0.05 * i, 2) for i in range(21)]
    uniform = uniform_without_labels(splits, grid, guards.balance)
    found = without_labels(settings.rule, splits, np.full(count, uniform), guards)
    published = adamerging(splits, PUBLISHED, seed=settings.seed)
    facts = {"rule": settings.rule, "ridge": guards.ridge, **found.facts()}
    return Combination(found.coefficients, uniform, facts, {"AdaMerging": published})


def combine_standard(model: Merged, uniform: float, settings: Settings) -> Combination:
    """Solved coefficients of a standard model, which is at the solution afterwards.

    Without labels, self-labels are those of the uniform point that is best without labels, and are
    not updated.

    Args:
        model: the model, with the splits to solve on.
        uniform: the coefficient for all directions to start from; without labels it is not used.
        settings: how to solve.

    Raises:
        UsageError: if the solver is "gauss-newton" and the directions move buffers.
    """
    count = len(model.vectors)
    centre = inside(np.full(count, uniform), settings.bounds)
    solver = settings.solver or cheaper(count, settings.passes, settings.rule is None)
    if model.buffers:
        if settings.solver == "gauss-newton":
            raise UsageError(
                "the vectors move buffers, such as the statistics of batch norms, which a "
                "linearisation in the parameters leaves out; choose quasi-newton"
            )
        solver = "quasi-newton"
    if settings.rule is not None:
        return _standard_unlabelled(model, solver, settings)
    if solver == "quasi-newton":
        ridge = RIDGE if settings.ridge is None else settings.ridge
        route = quasi_newton(model, centre, ridge, bounds=settings.bounds)
        return Combination(route.coefficients, uniform, route.facts())
    table: list[dict[str, Any]] = []

    def chosen(splits: list[Reduced]) -> float:
        """The cross-validated ridge of the first linearisation, around zero steps."""
        around = settings.bounds and tuple(end - centre for end in settings.bounds)
        found = cross_validated(supervised(splits), 0 * centre, seed=settings.seed, bounds=around)
        table.extend(found.facts()["cross_validation"])
        return found.ridge

    strength = chosen if settings.ridge is None else settings.ridge
    route = gauss_newton(model, centre, strength, passes=settings.passes, bounds=settings.bounds)
    facts = route.facts()
    if math.isinf(route.ridge):
        facts["ridge"] = "inf"
    return Combination(route.coefficients, uniform, {**facts, "cross_validation": table})


def _standard_unlabelled(model: Merged, solver: Solver, settings: Settings) -> Combination:
    guards, ones = settings.guarded(), np.ones(len(model.vectors))

    def doubt(coefficient: float) -> float:
        terms = unlabelled_terms(model.logits(coefficient * ones), guards.balance)
        return Objective(terms, np.zeros(0)).value(np.zeros(0))

    centre = min((round(0.1 * i, 1) for i in range(11)), key=doubt) * ones
    centre = inside(centre, settings.bounds)
    start = model.logits(centre) if settings.rule == "selflabel" else []
    labelled = [self_labels(split, np.zeros(0), guards.confidence) for split in start]

    def terms(splits: list[Reduced]) -> list[Term]:
        if settings.rule == "entropy":
            return unlabelled_terms(splits, guards.balance)
        share = 1 / len(splits)
        return [
            Term(replace(split, labels=own.reduced.labels), cross_entropy, share, own.weights)
            for split, own in zip(splits, labelled, strict=True)
        ]

    ridge, box = guards.ridge, guards.box(centre)
    if solver == "quasi-newton":
        route = quasi_newton(model, centre, ridge, bounds=box, terms=terms)
    else:
        route = gauss_newton(model, centre, ridge, terms, settings.passes, box)
    return Combination(
        route.coefficients, float(centre[0]), {"rule": settings.rule, **route.facts()}
    )


def reductions(
    encoder: LinearEncoder, vectors: Sequence[State], splits: Sequence[Split], folder: Path | None
) -> list[Reduced]:
    """Each split along the directions, see `reduce`."""
    return [reduce(encoder, vectors, split, folder) for split in splits]


def accuracies(
    encoder: Encoder,
    vectors: Sequence[State],
    points: dict[str, Float64[np.ndarray, " directions"]],
    splits: Sequence[Split],
) -> dict[str, dict[str, float]]:
    """The main metric of each split at each point: point -> split -> value.

    Args:
        encoder: at theta0, standard or linear; left unchanged.
        vectors: the directions.
        points: coefficients by name.
        splits: the images.
    """
    taus = {name: _factored(vectors, a) for name, a in points.items() if np.any(a)}
    found: dict[str, dict[str, float]] = {name: {} for name in points}
    for split in splits:
        metrics = _linear(encoder, taus, split) if is_linear(encoder) else {}
        for name in points:
            if is_linear(encoder):
                found[name][split.name] = metrics[name if name in taus else ""]
            else:
                coef, tau = taus[name] if name in taus else (0.0, dict(vectors[0]))
                found[name][split.name] = split.sweep(encoder, tau, [coef])[0]
    return found


def _factored(
    vectors: Sequence[State], coefs: Float64[np.ndarray, " directions"]
) -> tuple[float, dict[str, Tensor]]:
    """The sum of coefs[k] * vectors[k] as a coefficient and a vector.

    Equal coefficients are factored out: the vector is then the plain sum, whose direction `add` has
    cached.
    """
    coef = float(coefs[0]) if np.ptp(coefs) == 0 else 1.0
    return coef, along(vectors, coefs / coef)


def _linear(
    encoder: LinearEncoder, taus: dict[str, tuple[float, dict[str, Tensor]]], split: Split
) -> dict[str, float]:
    """The main metric of a linear encoder moved by coefficient * vector of each, and "" at theta0.

    One pass over the split.
    """
    compute = split.compute or Compute.of(encoder.weights())
    steps = [tau for _, tau in taus.values()]
    features = linear_features(encoder, steps, split.batches, compute, split.cache)
    features, head = features.to(compute.device), split.head.to(compute.device)
    points = {name: [coef * (name == o) for o in taus] for name, (coef, _) in taus.items()}
    points[""] = [0.0] * len(steps)
    with torch.no_grad():
        return {
            name: main_of(measured(head(features.at(point).float()), features.labels))
            for name, point in points.items()
        }


def placed(encoder: ModuleEncoder, tau: State) -> None:
    """Moves an encoder by a vector, in place."""
    encoder.load_weights(move({n: v.clone() for n, v in encoder.weights().items()}, tau))
