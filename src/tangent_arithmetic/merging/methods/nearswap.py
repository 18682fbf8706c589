"""Nearswap: a step from one model towards another that no weight goes further than t."""

from __future__ import annotations

from torch import Tensor

from tangent_arithmetic.merging.registry import Piece, merging_method
from tangent_arithmetic.runtime.errors import UsageError


@merging_method(
    "nearswap",
    source="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    needs_pretrained=False,
    num_models=2,
    ordered=True,
    drops=True,
)
def nearswap(piece: Piece, *, t: float = 1e-4) -> Tensor:
    r"""\(\theta = u + \max(-t, \min(t, v - u))\), weight by weight.

    mergekit writes it as \(w v + (1 - w) u\) with \(w = \min(1, t / |v - u|)\).

    Args:
        piece: one piece of the two models u and v; u is the pre-trained one if there is one.
        t: above 0; weights that differ by no more become those of v.

    Source: alchemonaut, QuartetAnemoi-70B-t0.0001, 2024; the name is mergekit's.
    """
    if not t > 0:
        raise UsageError(f"nearswap's t must be above 0, got {t}")
    u, v = piece.thetas
    return (v - u).clamp_(-t, t).add_(u)
