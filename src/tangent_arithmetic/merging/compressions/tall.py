r"""TALL masks: a mask per task tells which weights of the sum of all task vectors it uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tangent_arithmetic.merging.compressing import Code, compression, size_of
from tangent_arithmetic.merging.methods.consensus import lambdas_of
from tangent_arithmetic.merging.registry import Piece


@compression("tall_masks", source="arXiv:2405.07813")
def tall_masks(
    piece: Piece, index: int, *, tall_mask_lambda: float | Sequence[float] = 0.4
) -> Code:
    r"""\(\hat\tau_t = m_t \odot \tau\) with \(m_t = [|\tau_t| \geq \lambda_t |\tau - \tau_t|]\).

    \(\tau = \sum_s \tau_s\) is stored once, \(m_t\) with 1 bit a weight.

    Args:
        piece: one piece of every model.
        index: t.
        tall_mask_lambda: lambda, one for all tasks or one per model. The paper chooses each task's
            among 0.2, 0.3 ... 0.6 by the accuracy of its masked model on validation.

    Source: Wang et al., "Localizing Task Information for Improved Model Merging and Compression",
    arXiv:2405.07813.
    """
    least = lambdas_of(tall_mask_lambda, piece.models)[index]
    total = torch.zeros_like(piece.base)
    for tau in piece.taus():
        total += tau
    own = piece.tau(index)
    mask = own.abs() >= least * (total - own).abs()
    return Code(total * mask, bits=len(mask), shared=size_of(total))
