"""Inner products of the models, tensor by tensor: all that spherical methods need."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tangent_arithmetic.merging.registry import Pieces

if TYPE_CHECKING:
    from jaxtyping import Float

Grams = dict[str, "Float[Tensor, 'models models']"]


def gram_matrices(pieces: Pieces, of_taus: bool) -> Grams:
    """The inner products of the models, or of their task vectors, by tensor, in float64.

    Args:
        pieces: starts a pass over the weights.
        of_taus: of the task vectors, if there is a pre-trained model.
    """
    grams: dict[str, Tensor] = {}
    for piece in pieces():
        vectors = piece.taus() if of_taus and piece.theta0 is not None else piece.thetas
        rows = torch.stack(tuple(vectors)).double()
        products = (rows @ rows.mT).cpu()
        grams[piece.name] = grams[piece.name] + products if piece.name in grams else products
    return grams


def combine(vectors: list[Tensor], factors: list[float]) -> Tensor:
    """The sum of vectors, each multiplied by its factor."""
    total = vectors[0] * factors[0]
    for vector, factor in zip(vectors[1:], factors[1:], strict=True):
        total.add_(vector, alpha=factor)
    return total
