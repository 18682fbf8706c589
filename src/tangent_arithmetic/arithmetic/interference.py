r"""Interference: how far a task vector moves the features of a linear model on images of any task.

\[ I_{ij} = E_{x \in D_i} \frac{\|J(x; \theta_0)\, \tau_j\|^2}{\|f(x; \theta_0)\|^2} \]

A sum of task vectors is as good as each vector alone where \(I_{ij} = 0\) for \(i \neq j\). The
diagonal is what a vector does on its own task; a coefficient \(a\) scales all by \(a^2\).

Source: Yoshida et al., "Mastering Task Arithmetic: τJp as a Key Indicator for Weight
Disentanglement", ICLR 2025, here relative to the features at theta0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from tangent_arithmetic.arithmetic.features import linear_features
from tangent_arithmetic.runtime import ddp
from tangent_arithmetic.runtime.errors import UsageError

if TYPE_CHECKING:
    from tangent_arithmetic.arithmetic.features import Features
    from tangent_arithmetic.arithmetic.sweeps import Split
    from tangent_arithmetic.encoders.base import LinearEncoder
    from tangent_arithmetic.storage.statedict import State

Matrix = Mapping[str, Mapping[str, float]]  # data set -> vector -> interference


class Means(NamedTuple):
    """What a matrix says in a few numbers; None where there is no such entry.

    Attributes:
        off: mean over pairs of different tasks.
        on: mean over the diagonal.
        largest: the pair of different tasks with the most interference: images, vector, value.
        control: mean over the rows of data sets without a vector.
    """

    off: float | None
    on: float | None
    largest: tuple[str, str, float] | None
    control: float | None

    def __str__(self) -> str:
        parts = [f"{_short(self.off)} off the diagonal, {_short(self.on)} on it"]
        if self.control is not None:
            parts.append(f"{_short(self.control)} on the control set")
        if self.largest is not None:
            images, vector, value = self.largest
            parts.append(f"largest: {_short(value)}, vector of {vector} on {images}")
        return "; ".join(parts)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def means(matrix: Matrix) -> Means:
    """The means of a matrix, and its largest entry off the diagonal."""
    vectors = {vector for row in matrix.values() for vector in row}
    cells = [(i, j, value) for i, row in matrix.items() for j, value in row.items()]
    off = [cell for cell in cells if cell[0] in vectors and cell[0] != cell[1]]

    def mean(values: list[float]) -> float | None:
        return fmean(values) if values else None

    return Means(
        off=mean([value for _, _, value in off]),
        on=mean([value for i, j, value in cells if i == j]),
        largest=max(off, key=lambda cell: cell[2], default=None),
        control=mean([value for i, _, value in cells if i not in vectors]),
    )


def of_features(features: Features) -> list[float]:
    """The interference of each direction, over the images of all ranks.

    Args:
        features: this rank's share; `directions` are J tau of each vector.

    Returns:
        The mean over images of |J tau|^2 / |f0|^2 for each vector, in float64.

    Raises:
        UsageError: if there are no images, or the features of one are 0 or not finite.
    """
    sums = [0.0] * len(features.directions)
    if len(features.labels):
        squares = features.f0.double().square().sum(dim=1)
        sums = [
            float((step.double().square().sum(dim=1) / squares).sum())
            for step in features.directions
        ]
    shares = ddp.gather((sums, len(features.labels)))
    images = sum(count for _, count in shares)
    if not images:
        raise UsageError("no images to measure interference on: the split is empty")
    if not all(math.isfinite(value) for values, _ in shares for value in values):
        raise UsageError(
            "interference is undefined: features at theta0, or their moves, are 0 or not finite "
            "for some image; expected features other than 0. Leave such images out"
        )
    return [sum(column) / images for column in zip(*(each for each, _ in shares), strict=True)]


def matrix(
    base: LinearEncoder, vectors: Mapping[str, State], splits: Mapping[str, Split]
) -> dict[str, dict[str, float]]:
    """The interference of each vector on the images of each split, one pass a split.

    Args:
        base: the linear encoder; only f and theta0 count.
        vectors: task vectors by name.
        splits: the images by name of their data set; cached features are used.

    Raises:
        UsageError: see `of_features`.
    """
    rows = {}
    for name, split in splits.items():
        taus = list(vectors.values())
        features = linear_features(base, taus, split.batches, split.compute, split.cache)
        rows[name] = dict(zip(vectors, of_features(features), strict=True))
    return rows
