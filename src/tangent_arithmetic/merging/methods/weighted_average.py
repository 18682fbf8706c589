r"""The weighted mean of the models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from torch import Tensor

from tangent_arithmetic.merging.registry import Piece, merging_method
from tangent_arithmetic.runtime.errors import UsageError


@cache
def shares(weights: tuple[float, ...], normalize: bool, models: tuple[str, ...]) -> list[float]:
    """The factor of each model.

    Raises:
        UsageError: if the number of weights is not that of the models, or they cannot be
            normalised.
    """
    if len(weights) != len(models):
        raise UsageError(
            f"expected {len(models)} weights, one for each of {', '.join(models)}; got "
            f"{len(weights)}"
        )
    total = sum(weights)
    if normalize and not total:
        raise UsageError("weights that sum to 0 cannot be normalised; add normalize=false")
    return [weight / total if normalize else weight for weight in weights]


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
