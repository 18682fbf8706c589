"""SCE: select the weights that differ, calculate coefficients, erase minorities of sign."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tangent_arithmetic.merging.registry import Piece, merging_method
from tangent_arithmetic.merging.trimming import blocks
from tangent_arithmetic.runtime.errors import UsageError


def selected(taus: Sequence[Tensor], share: float) -> Tensor:
    """Where the variance over the models is among the largest: a share of those that are not 0."""
    variance = torch.cat([rows.var(dim=0, correction=0) for rows in blocks(taus)])
    kept = int(share * int(variance.count_nonzero()))
    if not kept:
        return torch.zeros_like(variance, dtype=torch.bool)
    return variance >= variance.kthvalue(len(variance) - kept + 1).values


def erased(rows: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of the entries that have the sign of their sum, plus where it is 0."""
    counted = torch.where(rows.sum(dim=0) >= 0, rows > 0, rows < 0) * weights[:, None]
    divisor = counted.sum(dim=0)
    merged = (rows * counted).sum(dim=0) / torch.where(divisor > 0, divisor, 1.0)
    return merged.to(rows.dtype)


@merging_method("sce", source="arXiv:2408.07990", whole=True)
def sce(piece: Piece, *, scaling_factor: float = 1.0, select_topk: float = 1.0) -> Tensor:
    r"""\(\theta = \theta_0 + \lambda \sum_t \eta_t \hat\tau_t / \sum_t \eta_t\), tensor by tensor.

    \(\hat\tau_t\) is the task vector where the variance over the models is largest, 0 elsewhere;
    \(\eta_t = \|\hat\tau_t\|^2 / \sum_s \|\hat\tau_s\|^2\). Weight by weight, the two sums above
    are over tasks whose \(\hat\tau_t\) has the sign of \(\sum_s \hat\tau_s\), plus where it is 0.

    Args:
        piece: one tensor of every model.
        scaling_factor: lambda, 1 in the paper.
        select_topk: the share of the weights whose variance is not 0 that stay; 1 for all weights.

    Source: Wan et al., "FuseChat: Knowledge Fusion of Chat Models", arXiv:2408.07990, section 3.3;
    name and option are mergekit's, which takes equal \(\eta_t\) where the sum of mean squares is
    below 1e-6.
    """
    if not 0 < select_topk <= 1:
        raise UsageError(f"sce's select_topk must be above 0 and at most 1, got {select_topk}")
    taus = list(piece.taus())
    if select_topk < 1:
        mask = selected(taus, select_topk)
        taus = [tau * mask for tau in taus]
    weights = torch.stack([tau.double().square().sum() for tau in taus])
    weights /= weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    merged = torch.cat([erased(rows, weights) for rows in blocks(taus)])
    return merged.mul_(scaling_factor).add_(piece.base)
