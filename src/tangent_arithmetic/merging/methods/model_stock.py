r"""Model stock: between the pre-trained model and the mean, where the angles put the centre."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tangent_arithmetic.merging.gram import Grams, gram_matrices
from tangent_arithmetic.merging.registry import Piece, Pieces, merging_method
from tangent_arithmetic.merging.spectral import mean_tau

POLE = 1e-6  # 1 + (T - 1) cos below this: the task vectors cancel


def prepare(pieces: Pieces, **_options: Any) -> Grams:
    """The inner products of the task vectors, tensor by tensor."""
    return gram_matrices(pieces, of_taus=True)


def ratio(gram: Tensor) -> float:
    r"""\(t = \max(0, T \cos\vartheta / (1 + (T - 1) \cos\vartheta))\); 1 for one model."""
    num_models = len(gram)
    if num_models == 1:
        return 1.0
    norms = gram.diagonal().sqrt()
    norms[norms == 0] = 1.0
    cosines = gram / norms[:, None] / norms
    pairs = num_models * (num_models - 1)
    cosine = float(cosines.sum() - cosines.diagonal().sum()) / pairs
    denominator = 1 + (num_models - 1) * cosine
    return max(0.0, num_models * cosine / denominator) if denominator > POLE else 0.0


@merging_method(
    "model_stock",
    source="arXiv:2403.19522",
    algorithm="ModelStock",
    config="model_stock/model_stock",
    prepare=prepare,
    passes=2,
)
def model_stock(
    piece: Piece, *, ignore_keys: Sequence[str] | None = None, statistics: Grams
) -> Tensor:
    r"""\(\theta = t\, \bar\theta + (1 - t)\, \theta_0\) with the mean \(\bar\theta\) of the models.

    \(t = \max(0, T \cos\vartheta / (1 + (T - 1) \cos\vartheta))\), tensor by tensor, with the
    angle \(\vartheta\) between two task vectors. Of several pairs, the cosines are averaged, as in
    mergekit; fusion-bench averages the angles. With the mean cosine, the denominator is never
    negative; where it is 0, the task vectors cancel and t is 0. Where the mean cosine is negative,
    t is 0 too: mergekit goes beyond theta0, away from the mean. A zero vector has the cosine 0.

    Args:
        piece: one piece of every model.
        ignore_keys: tensors that become the mean (t = 1).
        statistics: the result of `prepare`.

    Source: Jang et al., "Model Stock", arXiv:2403.19522.
    """
    t = 1.0 if piece.name in (ignore_keys or ()) else ratio(statistics[piece.name])
    return mean_tau(piece).mul_(t).add_(piece.base)
