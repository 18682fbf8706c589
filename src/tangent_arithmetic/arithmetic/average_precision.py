r"""Average precision: how well scores rank the images that have a label above those that do not.

\[ AP = \sum_n (R_n - R_{n-1})\, P_n \]

\(P_n\) and \(R_n\) are precision and recall of the images whose score is at least the n-th highest
distinct score; images with the same score count together. No interpolation.

Source: Zhu, "Recall, Precision and Average Precision", University of Waterloo (2004); the
definition of scikit-learn's `average_precision_score`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tangent_arithmetic.runtime.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, UInt8


def average_precision(scores: Float[Tensor, " images"], truth: Bool[Tensor, " images"]) -> float:
    """Average precision in (0, 1]; without a positive image it is undefined, and 0.

    Args:
        scores: one per image, higher for images more likely to have the label; NaN ranks last.
        truth: whether each image has it.
    """
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    scores, order = scores.sort(descending=True, stable=True)
    hits = truth.bool()[order].double().cumsum(0)
    last = torch.ones_like(scores, dtype=torch.bool)  # of the images with the same score
    last[:-1] = scores[1:] != scores[:-1]
    (ends,) = last.nonzero(as_tuple=True)
    found = hits[ends]
    precision = found / (ends + 1)
    gained = found.diff(prepend=found.new_zeros(1))
    total = float(hits[-1]) if len(hits) else 0.0
    return float((precision * gained).sum()) / total if total else 0.0


def mean_average_precision(
    scores: Float[Tensor, "images classes"], truth: UInt8[Tensor, "images classes"]
) -> float:
    """The mean of the average precisions of the classes that some image has.

    Raises:
        UsageError: if no image has a label.
    """
    occurring = truth.bool().any(dim=0).nonzero().flatten().tolist()
    if not occurring:
        raise UsageError(
            f"none of {len(truth)} images has a label, so that their mean average precision is "
            "undefined; expected at least one image with one. Give the split such images, or leave "
            "its data set out"
        )
    each = [average_precision(scores[:, k], truth[:, k]) for k in occurring]
    return sum(each) / len(each)
