r"""Model breadcrumbs: each task vector without its smallest and its largest weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tangent_arithmetic.merging.methods.weighted_average import shares
from tangent_arithmetic.merging.registry import Piece, merging_method, one_per_model
from tangent_arithmetic.merging.trimming import merge_blocks
from tangent_arithmetic.runtime.errors import UsageError


def middle(tau: Tensor, beta: float, gamma: float) -> Tensor:
    """A tensor with shares beta of its smallest and gamma of its largest magnitudes set to 0."""
    sizes, number = tau.abs(), len(tau)
    smallest, largest = int(beta * number), int(gamma * number)
    if smallest + largest >= number:
        return torch.zeros_like(tau)
    low = sizes.kthvalue(smallest + 1).values
    high = sizes.kthvalue(number - largest).values
    return torch.where((sizes >= low) & (sizes <= high), tau, torch.zeros_like(tau))


@merging_method("breadcrumbs", source="arXiv:2312.06795", whole=True)
def breadcrumbs(
    piece: Piece,
    *,
    scaling_factor: float = 0.3,
    beta: float = 0.85,
    gamma: float = 0.007,
    elect: bool = False,
    weights: float | Sequence[float] = 1.0,
    normalize: bool = False,
) -> Tensor:
    r"""\(\theta = \theta_0 + \alpha \sum_t w_t m_t^{\beta,\gamma} \odot \tau_t\), tensor by tensor.

    The mask \(m_t\) is 0 for the `int(beta * n)` smallest and the `int(gamma * n)` largest
    magnitudes of n, and 1 for the others; all magnitudes equal to the smallest or largest that
    stays stay too. mergekit's `density` is 1 - beta - gamma; the authors' code masks each row of a
    tensor (its last dimension) by itself.

    Args:
        piece: one tensor of every model.
        scaling_factor: alpha.
        beta: share of the smallest weights to drop.
        gamma: share of the largest weights, the outliers, to drop.
        elect: elect a sign, as `ties`, and leave out the others (mergekit's `breadcrumbs_ties`);
            plus where the sum is 0, see `trimming.merge_rows`.
        weights: w, one for all task vectors or one per model, which count in the election too.
        normalize: divide by the sum of the weights, of those that agree if a sign is elected.

    Source: Davari and Belilovsky, "Model Breadcrumbs", arXiv:2312.06795.
    """
    if not (beta >= 0 and gamma >= 0 and beta + gamma < 1):
        raise UsageError(
            "breadcrumbs' beta and gamma must be at least 0 and sum to less than 1, got "
            f"beta={beta}, gamma={gamma}"
        )
    factors = one_per_model(weights, piece.models, "weights")
    kept = (middle(tau, beta, gamma) for tau in piece.taus())
    if elect:
        total = merge_blocks(list(kept), factors, normalize, elect_sign=True)
    else:
        total = torch.zeros_like(piece.base)
        for tau, factor in zip(kept, shares(tuple(factors), normalize, piece.models), strict=True):
            total.add_(tau, alpha=factor)
    return total.mul_(scaling_factor).add_(piece.base)
