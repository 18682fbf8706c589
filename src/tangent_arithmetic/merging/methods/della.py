r"""DELLA: small weights of a task vector are dropped with a higher probability than large ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tangent_arithmetic.merging.methods.dare import uniform
from tangent_arithmetic.merging.registry import Piece, merging_method, one_per_model
from tangent_arithmetic.merging.trimming import merge_blocks
from tangent_arithmetic.runtime.errors import UsageError


def drop_probabilities(rows: Tensor, sparsity_ratio: float, epsilon: float) -> Tensor:
    r"""\(p_i = p - \epsilon/2 + \epsilon\, r_i / (n - 1)\), with ranks \(r_i\) within each row.

    Args:
        rows: the weights; the largest magnitude of a row of n has the rank 0.
        sparsity_ratio: p, the mean.
        epsilon: the width of the range.
    """
    n = rows.shape[1]
    order = rows.abs().argsort(dim=1, descending=True, stable=True)
    half = epsilon / 2 if n > 1 else 0.0
    steps = torch.linspace(sparsity_ratio - half, sparsity_ratio + half, n, dtype=torch.float64)
    return torch.empty_like(rows).scatter_(1, order, steps.to(rows).expand_as(rows))


def pruned(
    piece: Piece, sparsity_ratio: float, epsilon: float, rescale: bool, seed: int
) -> list[Tensor]:
    """The task vectors with weights dropped at random."""
    width = math.prod(piece.shape[1:]) if len(piece.shape) > 1 else len(piece.base)
    kept = []
    for model, tau in zip(piece.models, piece.taus(), strict=True):
        p = drop_probabilities(tau.view(-1, width), sparsity_ratio, epsilon).view(-1)
        stays = uniform(seed, model, piece.name, piece.start, len(tau)).to(p) >= p
        kept.append(torch.where(stays, tau / (1 - p) if rescale else tau, torch.zeros_like(tau)))
    return kept


@merging_method("della", source="arXiv:2406.11617", whole=True, of_outputs=True)
def della(
    piece: Piece,
    *,
    scaling_factor: float = 1.1,
    sparsity_ratio: float = 0.3,
    epsilon: float = 0.14,
    elect: bool = True,
    rescale: bool = True,
    seed: int = 0,
    weights: float | Sequence[float] = 1.0,
    normalize: bool = True,
) -> Tensor:
    r"""\(\theta = \theta_0 + \lambda\, m\), m the mean of the \(w_t \hat\tau_t\) of one sign.

    \(\hat\tau_t\) drops each weight with its probability \(p_i\) and divides the others by
    \(1 - p_i\). Within a row of n weights, \(p_i = p - \epsilon/2 + \epsilon r_i / (n - 1)\) with
    the rank \(r_i\), 0 for the largest magnitude, as in the authors' code; the paper divides by n.
    A row belongs to one output; a vector is one row. The sign is that of the sum of the
    \(w_t \hat\tau_t\), weight by weight, plus where it is 0, see `trimming.merge_rows`.

    Args:
        piece: one tensor of every model.
        scaling_factor: lambda.
        sparsity_ratio: p, the mean probability to be dropped.
        epsilon: the range of the probabilities, from p - epsilon/2 to p + epsilon/2; mergekit's
            `epsilon` is half of it.
        elect: elect a sign; else m is of all models.
        rescale: divide by 1 - p.
        seed: seed of the masks, see `merging.methods.dare`.
        weights: w, one for all task vectors or one per model, which count in the election too.
        normalize: divide by the sum of the weights; else m is the sum. mergekit's `della_linear` is
            the sum without election.

    Source: Deep et al., "DELLA-Merging", arXiv:2406.11617, section 2 and algorithm 1.
    """
    low, high = sparsity_ratio - epsilon / 2, sparsity_ratio + epsilon / 2
    if not (epsilon >= 0 and low >= 0 and high < 1):
        raise UsageError(
            "della's sparsity_ratio - epsilon/2 must be at least 0 and sparsity_ratio + epsilon/2 "
            f"below 1, got sparsity_ratio={sparsity_ratio}, epsilon={epsilon}"
        )
    kept = pruned(piece, sparsity_ratio, epsilon, rescale, seed)
    factors = one_per_model(weights, piece.models, "weights")
    merged = merge_blocks(kept, factors, normalize, elect)
    return merged.mul_(scaling_factor).add_(piece.base)
