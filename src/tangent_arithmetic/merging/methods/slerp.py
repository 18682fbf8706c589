"""Spherical linear interpolation of two models, tensor by tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tangent_arithmetic.merging.registry import Piece, Pieces, merging_method
from tangent_arithmetic.runtime.errors import UsageError


def products(pieces: Pieces, **_options: Any) -> dict[str, tuple[float, float, float]]:
    """The products u.u, v.v and u.v of each tensor of the two models, in float64."""
    sums: dict[str, tuple[float, float, float]] = {}
    for piece in pieces():
        u, v = (theta.double() for theta in piece.thetas)
        here = (float(u @ u), float(v @ v), float(u @ v))
        before = sums.get(piece.name, (0.0, 0.0, 0.0))
        sums[piece.name] = (before[0] + here[0], before[1] + here[1], before[2] + here[2])
    return sums


def factors(
    sums: tuple[float, float, float], t: float, threshold: float, epsilon: float
) -> tuple[float, float]:
    r"""The factors of u and v.

    With the angle \(\omega\) between the two: \(\sin((1-t)\omega)/\sin\omega\) and
    \(\sin(t\omega)/\sin\omega\); where \(|\cos\omega|\) exceeds the threshold, \(1 - t\) and t. A
    vector not longer than epsilon is not normalised.
    """
    norm_u, norm_v = math.sqrt(sums[0]), math.sqrt(sums[1])
    length_u, length_v = (n if n > epsilon else 1.0 for n in (norm_u, norm_v))
    cosine = sums[2] / (length_u * length_v)
    if abs(cosine) > threshold:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


@merging_method(
    "slerp",
    algorithm="SlerpMergeAlgorithm",
    config="slerp/slerp",
    source="Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985",
    prepare=products,
    passes=2,
    needs_pretrained=False,
    num_models=2,
    ordered=True,
)
def slerp(
    piece: Piece,
    *,
    t: float = 0.5,
    DOT_THRESHOLD: float = 0.9995,
    epsilon: float = 1e-8,
    statistics: dict[str, tuple[float, float, float]],
) -> Tensor:
    r"""\(\frac{\sin((1-t)\omega)}{\sin\omega} u + \frac{\sin(t\omega)}{\sin\omega} v\).

    Args:
        piece: one piece of the two models u and v; u is the pre-trained one if there is one.
        t: 0 gives u, 1 gives v.
        DOT_THRESHOLD: interpolation is linear if the cosine of the angle omega exceeds this.
        epsilon: a tensor not longer than this is not normalised.
        statistics: the result of `products`.

    Source: Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985; the fallbacks
    are those of fusion-bench 0.2.33 and mergekit 0.1.5.
    """
    if not 0 <= t <= 1:
        raise UsageError(f"slerp's t must be from 0 to 1, got {t}")
    if not 0 <= DOT_THRESHOLD < 1:
        raise UsageError(
            f"slerp's DOT_THRESHOLD must be at least 0 and below 1, got {DOT_THRESHOLD}"
        )
    if not epsilon >= 0:
        raise UsageError(f"slerp's epsilon must be at least 0, got {epsilon}")
    a, b = factors(statistics[piece.name], t, DOT_THRESHOLD, epsilon)
    u, v = piece.thetas
    return torch.mul(u, a).add_(v, alpha=b)
