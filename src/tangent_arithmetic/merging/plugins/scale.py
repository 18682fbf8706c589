r"""Scaling before any method: a factor for each task vector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from tangent_arithmetic.merging.registry import Piece, one_per_model, plugin


@plugin("scale", source="none")
def scale(piece: Piece, *, factors: float | Sequence[float]) -> Iterator[Tensor]:
    r"""\(\hat\tau_t = a_t\, \tau_t\).

    Args:
        piece: one piece of every model.
        factors: the \(a_t\): one number, or one for each model, in the pool's order.
    """
    each = one_per_model(factors, piece.models, "the factors of scale")
    return (tau.mul_(factor) for tau, factor in zip(piece.taus(), each, strict=True))
