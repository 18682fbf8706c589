r"""Inner products of the features of a split, for the explorer: probabilities need their norms.

Accuracies of a head without bias do not, so that `arithmetic/logits.py` leaves them out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from tangent_arithmetic.analysis.edits import Edits
from tangent_arithmetic.arithmetic.features import linear_features
from tangent_arithmetic.arithmetic.logits import Logits, gathered, of_features
from tangent_arithmetic.encoders.base import is_linear
from tangent_arithmetic.encoders.images import ClassificationHead

if TYPE_CHECKING:
    from jaxtyping import Float64
    from torch import Tensor

    Inner = Float64[Tensor, "images 1+vectors 1+vectors"]


def logits_and_inner(edits: Edits, name: str) -> tuple[Logits, Inner | None]:
    r"""The logits of a split and the inner products of \(f_0, d_1, ..., d_T\), from one pass.

    Args:
        edits: a linear model and its vectors.
        name: the split.

    Returns:
        Both over all ranks; no inner products if the head does not normalise.
    """
    split, base, vectors = edits.split(name), edits.base, edits.vectors
    assert is_linear(base) and isinstance(split.head, ClassificationHead)
    taus = list(vectors.values())
    features = linear_features(base, taus, split.batches, split.compute, split.cache)
    logits = of_features(features, split.head, split.name, list(vectors))
    logits = replace(logits, of=split.whole or split.num_images or logits.of)
    if not split.head.normalize:
        return gathered(logits), None
    count = len(features.labels)
    parts = [part.reshape(count, -1) for part in (features.f0, *features.directions)]
    wide = torch.stack(parts, dim=1).double()
    whole = gathered(replace(logits, gram=wide @ wide.transpose(1, 2)))
    kept = whole if logits.gram is not None else replace(whole, gram=None)
    return kept, whole.gram
