"""NuSLERP: spherical interpolation of two task vectors, or of two models, whole or by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from tangent_arithmetic.merging.methods.weighted_average import shares
from tangent_arithmetic.merging.registry import Piece, merging_method

if TYPE_CHECKING:
    from jaxtyping import Float

FLAT = 3e-4  # sin(angle) below this: the directions are equal or opposite, to float32's rounding


def interpolated(
    u: Float[Tensor, "... n"], v: Float[Tensor, "... n"], t: float
) -> Float[Tensor, "... n"]:
    """Spherical interpolation of the last dimension; linear where directions are parallel."""
    directions = (F.normalize(each, dim=-1, eps=torch.finfo(u.dtype).tiny) for each in (u, v))
    angle = torch.linalg.vecdot(*directions).clamp(-1, 1).acos().unsqueeze(-1)
    sine = angle.sin()
    flat = sine < FLAT
    a = torch.where(flat, 1 - t, ((1 - t) * angle).sin() / sine)
    b = torch.where(flat, t, (t * angle).sin() / sine)
    return a * u + b * v


@merging_method(
    "nuslerp",
    source="Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985",
    needs_pretrained=False,
    num_models=2,
    whole=True,
)
def nuslerp(
    piece: Piece,
    *,
    weights: Sequence[float] = (0.5, 0.5),
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Tensor:
    r"""\(\theta = \theta_0 + (\sin((1 - t)\, \omega)\, u + \sin(t\, \omega)\, v) / \sin\omega\).

    u and v are the two task vectors, or without a pre-trained model the two models, \(\omega\) is
    their angle and \(t = w_2 / (w_1 + w_2)\). A vector that is 0 is at a right angle to others.
    Where \(\sin\omega < 3 \cdot 10^{-4}\), the interpolation is linear.

    Args:
        piece: one tensor of both models.
        weights: w.
        nuslerp_flatten: the vectors are whole tensors; else those along one dimension.
        nuslerp_row_wise: along the first dimension, else along the last one: of a matrix, its
            columns, else its rows. mergekit's guide says the opposite of its code, which this
            follows.

    Source: Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985; name and options
    are mergekit's.
    """
    t = shares(tuple(weights), True, piece.models)[1]
    vectors = piece.thetas if piece.theta0 is None else tuple(piece.taus())
    shape = (-1,) if nuslerp_flatten else piece.shape or (1,)
    u, v = (vector.double().view(shape) for vector in vectors)
    if nuslerp_row_wise:
        u, v = u.transpose(0, -1), v.transpose(0, -1)
    merged = interpolated(u, v, t)
    merged = merged.transpose(0, -1) if nuslerp_row_wise else merged
    merged = merged.reshape(-1).to(piece.thetas[0].dtype)
    return merged if piece.theta0 is None else merged.add_(piece.theta0)
