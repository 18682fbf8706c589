"""Scores of tasks: of answers in words, and their mean over tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

MEAN = "mean"


def with_mean(scores: Mapping[str, float]) -> dict[str, float]:
    """The scores by task, and their mean."""
    return {**scores, MEAN: sum(scores.values()) / len(scores)}


def exact_match(found: Sequence[str], true: Sequence[str]) -> float:
    """The share of answers that are the true ones to the letter."""
    return sum(a == b for a, b in zip(found, true, strict=True)) / len(true)


def spearman(found: Sequence[str], true: Sequence[str]) -> float:
    """Spearman's correlation of answers read as numbers; what is none counts as 0.

    0 if all answers are the same, for which there is no correlation.
    """
    from scipy.stats import spearmanr

    numbers = [[_number(text) for text in texts] for texts in (found, true)]
    if min(len(set(values)) for values in numbers) == 1:
        return 0.0
    return float(spearmanr(*numbers).statistic)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0
