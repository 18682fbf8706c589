r"""Scaling before any method: a factor for each task vector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from tangent_arithmetic.merging.registry import PRETRAINED, Piece, one_per_model, plugin


@plugin("scale", source="none")
def scale(piece: Piece, *, factors: float | Sequence[float]) -> Iterator[Tensor]:
    r"""\(\hat\tau_t = a_t\, \tau_t\).

    Args:
        piece: one piece of every model.
        factors: the \(a_t\): one number, or one for each model, in the pool's order, without the
            pre-trained one.
    """
    models = [model for model in piece.models if model != PRETRAINED]
    each = dict(zip(models, one_per_model(factors, models, "the factors of scale"), strict=True))
    pairs = zip(piece.taus(), piece.models, strict=True)
    return (tau.mul_(each.get(model, 1.0)) for tau, model in pairs)
