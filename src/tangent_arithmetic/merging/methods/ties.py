r"""TIES: trim the task vectors, elect a sign for each weight, merge the entries with that sign.

Definitions differ between implementations, and both are available:

==================  =================================  ==========================================
option              as the paper's code, fusion-bench  as mergekit
==================  =================================  ==========================================
scope               "global": one threshold over the   "tensor": the largest int(K n), at least
                    whole vector; the largest          one, of each tensor of n weights
                    int(K d) + 1 of d weights stay
zero_sign           "majority": where the sum is 0,    "positive"
                    the sign that most weights have
merge_func          "sum", "mean" or "max"             "mean" (its `normalize`) or "sum"
==================  =================================  ==========================================

Magnitudes equal to the threshold all stay; mergekit keeps only some of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from tangent_arithmetic.merging.registry import Piece, Pieces, merging_method, one_per_model
from tangent_arithmetic.merging.trimming import Elected, elect, merge_rows


def prepare(pieces: Pieces, **options: Any) -> Elected:
    """Thresholds and majority sign of the task vectors."""
    return elect(pieces, Piece.taus, **options)


@merging_method(
    "ties",
    source="arXiv:2306.01708",
    algorithm="TiesMergingAlgorithm",
    config="ties_merging",
    prepare=prepare,
    passes=4,
    drops=True,
)
def ties(
    piece: Piece,
    *,
    scaling_factor: float = 0.3,
    threshold: float = 20,
    remove_keys: Sequence[str] = (),
    merge_func: Literal["sum", "mean", "max"] = "sum",
    scope: Literal["global", "tensor"] = "global",
    zero_sign: Literal["majority", "positive"] = "majority",
    weights: float | Sequence[float] = 1.0,
    statistics: Elected,
) -> Tensor:
    r"""\(\theta = \theta_0 + \lambda\, m\), m of the \(w_t \hat\tau_t\) of sign \(\gamma\).

    \(\hat\tau_t\) is the task vector with all but its largest magnitudes set to 0, \(\gamma\) the
    sign of \(\sum_t w_t \hat\tau_t\), weight by weight; see `trimming.merge_rows`.

    Args:
        piece: one piece of every model.
        scaling_factor: lambda.
        threshold: how many of the weights stay: a percentage if above 1, else a fraction.
        remove_keys: tensors that keep their pre-trained values.
        merge_func: how the agreeing entries are merged.
        scope: the range of a threshold, see above.
        zero_sign: the sign where the sum is 0, see above.
        weights: w, one for all task vectors or one per model, which count in the election too.
        statistics: the result of `prepare`.

    Source: Yadav et al., "TIES-Merging", arXiv:2306.01708, section 4.
    """
    if piece.name in remove_keys:
        return piece.base.clone()
    trimmed = statistics.trimmed(piece.name, piece.taus())
    factors = one_per_model(weights, piece.models, "weights")
    merged = merge_rows(trimmed, factors, merge_func, statistics.zero_sign)
    return merged.mul_(scaling_factor).add_(piece.base)
