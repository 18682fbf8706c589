r"""Means on the sphere: the directions of the models are averaged along great circles.

Both methods need only the inner products of the models: the mean is a linear combination of them,
whose factors follow from the Gram matrix of each tensor, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tangent_arithmetic.merging.gram import Grams, combine, gram_matrices
from tangent_arithmetic.merging.methods.weighted_average import shares
from tangent_arithmetic.merging.registry import Piece, Pieces, merging_method
from tangent_arithmetic.runtime.errors import UsageError

SHORT = 1e-7  # a mean direction below this is none: inner products do not resolve it
TINY = 1e-12  # angle below which a step changes nothing
FLAT = 1e-6  # sin(angle) below this: the directions are equal or opposite


def thetas(pieces: Pieces, **_options: Any) -> Grams:
    """The inner products of the models, tensor by tensor."""
    return gram_matrices(pieces, of_taus=False)


def vectors(pieces: Pieces, **_options: Any) -> Grams:
    """The inner products of the task vectors, or of the models without a pre-trained one."""
    return gram_matrices(pieces, of_taus=True)


def spherical(gram: Tensor, shares: Sequence[float], steps: int, tol: float) -> list[float]:
    r"""The factors of the vectors in their mean on the sphere, times their mean norm.

    One step moves the unit vector m to \(\exp_m \sum_t w_t \log_m u_t\), where \(u_t\) are the
    directions of the vectors and \(\log_m u = \omega / \sin\omega\, (u - \cos\omega\, m)\) with the
    angle \(\omega\) between m and u. The first m is the normalised mean of the directions. One
    that is opposite to m, from where every direction is as near, is passed over.

    Args:
        gram: inner products of the vectors; a zero vector has no direction and is left out.
        shares: w, at least 0.
        steps: the largest number of steps.
        tol: stop when a step is shorter than this angle.

    Returns:
        The factors; plain shares where the directions cancel or all vectors are 0.
    """
    norms = gram.diagonal().clamp(min=0).sqrt()
    weights = torch.tensor(shares, dtype=gram.dtype)
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    cosines = gram * inverse * inverse[:, None]
    directed = weights * (norms > 0)
    mean = directed / directed.sum() if directed.sum() else directed
    length = (mean @ cosines @ mean).clamp(min=0).sqrt()
    if length <= SHORT:
        return list(shares)
    mean = mean / length
    for _ in range(steps):
        cosine = (cosines @ mean).clamp(-1, 1)
        angle = cosine.acos()
        sine = angle.sin()
        stretch = torch.where(sine > FLAT, angle / sine, (cosine > 0).to(sine)) * directed
        step = stretch - (stretch @ cosine) * mean
        size = (step @ cosines @ step).clamp(min=0).sqrt()
        if size <= TINY:
            break
        mean = size.cos() * mean + size.sin() / size * step
        mean = mean / (mean @ cosines @ mean).sqrt()
        if size < tol:
            break
    factors: list[float] = (mean * inverse * (weights @ norms)).tolist()
    return factors


@merging_method(
    "karcher",
    source="Karcher, Riemannian center of mass and mollifier smoothing, 1977",
    prepare=thetas,
    passes=2,
    needs_pretrained=False,
)
def karcher(piece: Piece, *, max_iter: int = 10, tol: float = 1e-5, statistics: Grams) -> Tensor:
    r"""The point of the sphere with the least sum of squared angles, times the mean norm.

    \(m = \arg\min_m \sum_t \angle(m, \theta_t)^2\), tensor by tensor, without the pre-trained
    model; options and defaults are those of mergekit. Where the directions cancel, the result is
    the mean of the models.

    Args:
        piece: one piece of every model.
        max_iter: the largest number of iterations, see `spherical`.
        tol: stop when an iteration moves m by less than this angle (radians).
        statistics: the result of `thetas`.

    Source: Karcher, "Riemannian center of mass and mollifier smoothing", Communications on Pure and
    Applied Mathematics 30, 1977.
    """
    if max_iter < 0 or not tol >= 0:
        raise UsageError(
            f"karcher's max_iter and tol must be at least 0, got max_iter={max_iter}, tol={tol}"
        )
    equal = [1 / len(piece.models)] * len(piece.models)
    factors = spherical(statistics[piece.name], equal, max_iter, tol)
    return combine(list(piece.thetas), factors)


@merging_method(
    "multislerp",
    source="Buss and Fillmore, Spherical averages, 2001",
    prepare=vectors,
    passes=2,
    needs_pretrained=False,
)
def multislerp(
    piece: Piece,
    *,
    weights: Sequence[float] = (),
    normalize_weights: bool = True,
    statistics: Grams,
) -> Tensor:
    r"""\(\exp_m \sum_t w_t \log_m u_t\) times the weighted mean norm: one step of `karcher`.

    m is the normalised weighted mean of the directions \(u_t\), of the task vectors where there is
    a pre-trained model, else of the models. mergekit projects the \(u_t\) in place of
    \(\log_m u_t\); the weighted sum of the projections is 0, so that its result keeps the
    direction m.

    Args:
        piece: one piece of every model.
        weights: w, one per model; none for equal ones.
        normalize_weights: divide the weights by their sum; else it scales the step and the norm.
        statistics: the result of `vectors`.

    Source: Buss and Fillmore, "Spherical averages and applications to spherical splines and
    interpolation", ACM Transactions on Graphics 20, 2001; name and options are mergekit's.
    """
    if not all(weight >= 0 for weight in weights):
        raise UsageError(f"multislerp's weights must be at least 0, got {list(weights)}")
    given = tuple(weights) or (1 / len(piece.models),) * len(piece.models)
    chosen = shares(given, normalize_weights, piece.models)
    factors = spherical(statistics[piece.name], chosen, 1, 0.0)
    if piece.theta0 is None:
        return combine(list(piece.thetas), factors)
    return combine(list(piece.taus()), factors).add_(piece.theta0)
