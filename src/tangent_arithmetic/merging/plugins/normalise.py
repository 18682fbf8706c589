r"""Norm normalisation: all task vectors get one length."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tangent_arithmetic.merging.registry import Piece, Pieces, plugin


def prepare(pieces: Pieces, **_options: Any) -> list[float]:
    """The factor of each task vector: the mean norm of all divided by its own."""
    squares: list[float] = []
    for piece in pieces():
        own = [float(tau.double().square().sum()) for tau in piece.taus()]
        squares = [a + b for a, b in zip(squares, own, strict=True)] if squares else own
    norms = [math.sqrt(square) for square in squares]
    lengths = [norm for norm in norms if norm > 0]
    mean = math.fsum(lengths) / max(1, len(lengths))
    return [mean / norm if norm > 0 else 1.0 for norm in norms]


@plugin("normalise", source="none", prepare=prepare)
def normalise(piece: Piece, *, statistics: list[float]) -> Iterator[Tensor]:
    r"""\(\hat\tau_t = \frac{\tau_t}{\|\tau_t\|} \cdot \frac{1}{T} \sum_s \|\tau_s\|\).

    The norm is the Euclidean norm of the whole task vector, over all floating-point tensors; a tied
    tensor counts once. A zero vector stays 0, and does not count in the mean. Vectors of equal norm
    do not change, so that a scaling factor means what it means without the plug-in.

    Args:
        piece: one piece of every model.
        statistics: the result of `prepare`.
    """
    return (tau.mul_(factor) for tau, factor in zip(piece.taus(), statistics, strict=True))
