r"""The weighted mean of the models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

from torch import Tensor

from tangent_arithmetic.merging.registry import Piece, merging_method
from tangent_arithmetic.runtime.errors import UsageError

CANCEL = 1e-8  # of the sum of the weights' magnitudes: a sum below it is that of rounding errors


@cache
def shares(weights: tuple[float, ...], normalize: bool, models: tuple[str, ...]) -> list[float]:
    """The factor of each model.

    Raises:
        UsageError: if the number of weights is not that of the models, or they cannot be
            normalised, since they cancel or overflow.
    """
    if len(weights) != len(models):
        raise UsageError(
            f"expected {len(models)} weights, one for each of {', '.join(models)}; got "
            f"{len(weights)}"
        )
    if not normalize:
        return list(weights)
    size = sum(map(abs, weights))
    total = math.fsum(weights) if size < math.inf else math.nan
    if not abs(total) > CANCEL * size:
        raise UsageError(
            f"weights that sum to {total:.3g} cannot be normalised, got {list(weights)}; choose "
            "others, or do not normalise them"
        )
    return [weight / total for weight in weights]


@merging_method(
    "weighted_average",
    source="arXiv:2203.05482",
    config="linear/weighted_average",
    needs_pretrained=False,
)
def weighted_average(
    piece: Piece, *, weights: Sequence[float] = (0.5, 0.5), normalize: bool = True
) -> Tensor:
    r"""\(\theta = \sum_t w_t \theta_t\), with the weights divided by their sum if `normalize`.

    Args:
        piece: one piece of every model.
        weights: w, one per model.
        normalize: divide the weights by their sum.

    Source: Wortsman et al., "Model soups", arXiv:2203.05482.
    """
    factors = shares(tuple(weights), normalize, piece.models)
    total = piece.thetas[0] * factors[0]
    for theta, factor in zip(piece.thetas[1:], factors[1:], strict=True):
        total.add_(theta, alpha=factor)
    return total
