"""Arcee Fusion: the weights of a second model where they differ most, the others of the first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tangent_arithmetic.merging.registry import Piece, merging_method
from tangent_arithmetic.merging.trimming import BLOCK

if TYPE_CHECKING:
    from jaxtyping import Float

FLOOR = 1e-8  # added to the shares of a softmax


def scores_of(u: Float[Tensor, "rows n"], v: Float[Tensor, "rows n"]) -> Float[Tensor, " weights"]:
    """The change of each weight times the divergence of its row, in float64."""
    p, q = (theta.double().softmax(dim=-1) + FLOOR for theta in (v, u))
    divergence = (p * (p / q).log()).sum(dim=-1, keepdim=True)
    return ((v - u).abs() * divergence).view(-1)


@merging_method(
    "arcee_fusion",
    source="Arcee AI, MergeKit v0.1, 2025",
    needs_pretrained=False,
    num_models=2,
    ordered=True,
    whole=True,
    of_outputs=True,
)
def arcee_fusion(piece: Piece) -> Tensor:
    r"""\(\theta = v\) where \(s \geq s_{1/2} + \frac{3}{2}(s_{3/4} - s_{1/4})\), else u.

    The score of a weight is \(s = |v - u| \cdot KL(p \| q)\), with the softmax p of its row of v
    and q of u, each plus 1e-8, along the last dimension. \(s_a\) is the score of rank
    \(\lfloor a (n - 1) \rfloor\), from 0, of a tensor's n. mergekit draws some of the scores of
    large tensors; here the ranks are exact, and the divergence is in float64.

    Args:
        piece: one tensor of the two models u and v; u is the pre-trained one if there is one.

    Source: Arcee AI, "Meet MergeKit v0.1: Arcee Fusion, Expanded Model Support, Multi-GPU
    Acceleration", 2025; as in mergekit's code.
    """
    u, v = piece.thetas
    width = piece.shape[-1] if piece.shape else 1
    rows = (theta.view(-1, width).split(max(1, BLOCK // width)) for theta in (u, v))
    scores = torch.cat([scores_of(*parts) for parts in zip(*rows, strict=True)])
    last = len(scores) - 1
    low, middle, high = (scores.kthvalue(k * last // 4 + 1).values for k in (1, 2, 3))
    return torch.where(scores >= middle + 1.5 * (high - low), v, u)
