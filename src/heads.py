"""Zero-shot classification heads, with the signatures of the public projects."""

from __future__ import annotations

from typing import Any

from tangent_arithmetic.encoders.heads import build_classification_head, zeroshot_weights
from tangent_arithmetic.encoders.images import ClassificationHead
from tangent_arithmetic.run.models import classification_head
from tangent_arithmetic.run.run import Run

__all__ = ["build_classification_head", "get_classification_head", "zeroshot_weights"]


def get_classification_head(args: Any, dataset: str) -> ClassificationHead:
    """The zero-shot head of a data set, see `run.models.classification_head`."""
    return classification_head(Run.of(args), dataset)
