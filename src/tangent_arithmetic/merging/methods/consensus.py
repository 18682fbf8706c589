r"""Consensus merging: task arithmetic on the weights that several tasks use (TALL masks)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tangent_arithmetic.merging.registry import Piece, Pieces, merging_method, per_model
from tangent_arithmetic.merging.trimming import Elected, elect, merge_rows
from tangent_arithmetic.runtime.errors import UsageError


def lambdas_of(tall_mask_lambda: float | Sequence[float], models: Sequence[str]) -> list[float]:
    """The lambda of each mask.

    Raises:
        UsageError: for a negative one, or a list whose length is not the number of models.
    """
    lambdas = per_model(tall_mask_lambda, len(models))
    if len(lambdas) != len(models) or not all(value >= 0 for value in lambdas):
        raise UsageError(
            f"tall_mask_lambda must be one number of at least 0, or {len(models)} of them, one for "
            f"each of {', '.join(models)}; got {tall_mask_lambda}"
        )
    return lambdas


def used_by_several(
    piece: Piece, merged: Tensor, tall_mask_lambda: float | Sequence[float], prun_thre_k: int
) -> Tensor:
    """A merged task vector where the TALL masks of at least k tasks are 1, 0 elsewhere.

    Raises:
        UsageError: if an option is out of range.
    """
    lambdas = lambdas_of(tall_mask_lambda, piece.models)
    if not 0 <= prun_thre_k <= len(piece.models):
        raise UsageError(
            f"prun_thre_k must be from 0 to the number of models, {len(piece.models)}, got "
            f"{prun_thre_k}"
        )
    used = torch.zeros_like(merged, dtype=torch.int32)
    for tau, value in zip(piece.taus(), lambdas, strict=True):
        used += tau.abs() > value * (merged - tau).abs()
    return merged * (used >= prun_thre_k)


@merging_method("consensus_task_arithmetic", source="arXiv:2405.07813")
def consensus_task_arithmetic(
    piece: Piece,
    *,
    scaling_factor: float = 0.3,
    tall_mask_lambda: float | Sequence[float] = 0.4,
    prun_thre_k: int = 2,
) -> Tensor:
    r"""\(\theta = \theta_0 + \alpha\, [\sum_t m_t \geq k] \odot \sum_t \tau_t\).

    The TALL mask of a task, \(m_t = [|\tau_t| > \lambda_t |\sum_s \tau_s - \tau_t|]\), marks the
    weights that it uses. Weights that fewer than k tasks use keep their pre-trained values.

    Args:
        piece: one piece of every model.
        scaling_factor: alpha, chosen on validation in the paper.
        tall_mask_lambda: lambda, one for all tasks or one per model. The paper chooses each task's
            among 0.2, 0.3 ... 0.6 by the accuracy of its masked model on validation.
        prun_thre_k: k; 0 is task arithmetic.

    Source: Wang et al., "Localizing Task Information for Improved Model Merging and Compression",
    arXiv:2405.07813.
    """
    total = torch.zeros_like(piece.base)
    for tau in piece.taus():
        total += tau
    kept = used_by_several(piece, total, tall_mask_lambda, prun_thre_k)
    return kept.mul_(scaling_factor).add_(piece.base)


def prepare(pieces: Pieces, *, threshold: float, **_options: Any) -> Elected:
    """Thresholds and majority sign of the task vectors, as in the code of TIES' authors."""
    return elect(pieces, Piece.taus, threshold=threshold, scope="global", zero_sign="majority")


@merging_method("consensus_ties", source="arXiv:2405.07813", prepare=prepare, passes=4, drops=True)
def consensus_ties(
    piece: Piece,
    *,
    scaling_factor: float = 0.3,
    tall_mask_lambda: float | Sequence[float] = 0.4,
    prun_thre_k: int = 2,
    threshold: float = 20,
    statistics: Elected,
) -> Tensor:
    r"""\(\theta = \theta_0 + \alpha\, [\sum_t m_t \geq k] \odot \tau\), with the \(\tau\) of TIES.

    As `consensus_task_arithmetic`, with the merged vector of `ties`, the sum of the trimmed entries
    of the elected sign, in the place of the sum of the task vectors, also in the masks
    \(m_t = [|\tau_t| > \lambda_t |\tau - \tau_t|]\) of the untrimmed \(\tau_t\).

    Args:
        piece: one piece of every model.
        scaling_factor: alpha, chosen on validation in the paper.
        tall_mask_lambda: lambda, one for all tasks or one per model.
        prun_thre_k: k; 0 is TIES.
        threshold: how many of the weights stay in TIES: a percentage if above 1, else a fraction.
        statistics: the result of `prepare`.

    Source: as `consensus_task_arithmetic`, section 4.3.
    """
    trimmed = statistics.trimmed(piece.name, piece.taus())
    merged = merge_rows(trimmed, [1.0] * len(trimmed), "sum", statistics.zero_sign)
    kept = used_by_several(piece, merged, tall_mask_lambda, prun_thre_k)
    return kept.mul_(scaling_factor).add_(piece.base)
