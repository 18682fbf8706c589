r"""EMR: elect one vector for all tasks, mask it for each task, rescale it for each task."""

from __future__ import annotations

import torch
from torch import Tensor

from tangent_arithmetic.merging.compressing import Code, compression, size_of
from tangent_arithmetic.merging.registry import Piece, Pieces

SCALE = 64  # bits of a rescaler


def unified(piece: Piece) -> Tensor:
    """The elected vector: the sign of the sum, and the largest magnitude of that sign."""
    total = torch.zeros_like(piece.base)
    for tau in piece.taus():
        total += tau
    sign, largest = total.sign(), torch.zeros_like(total)
    for tau in piece.taus():
        largest = torch.maximum(largest, tau * sign)
    return largest * sign


def prepare(pieces: Pieces, index: int) -> float:
    """The rescaler of a task; 0 where the mask is empty."""
    own = masked = 0.0
    for piece in pieces():
        tau, elected = piece.tau(index), unified(piece)
        own += float(tau.double().abs().sum())
        masked += float(elected.double().abs()[tau * elected > 0].sum())
    return own / masked if masked else 0.0


@compression("emr", source="arXiv:2405.17461", prepare=prepare, header=SCALE)
def emr(piece: Piece, index: int, *, statistics: float) -> Code:
    r"""\(\hat\tau_t = \gamma_t\, m_t \odot \tau\) with \(m_t = [\tau_t \odot \tau > 0]\).

    \(\tau\) has the sign of \(\sum_s \tau_s\) and the largest magnitude among the \(\tau_s\) of
    that sign, weight by weight; \(\gamma_t = \sum |\tau_t| / \sum |m_t \odot \tau|\) over the whole
    vector. \(\tau\) is stored once, \(m_t\) with 1 bit a weight, \(\gamma_t\) with 64 bits.

    Args:
        piece: one piece of every model.
        index: t.
        statistics: the result of `prepare`.

    Source: Huang et al., "EMR-Merging: Tuning-Free High-Performance Model Merging",
    arXiv:2405.17461.
    """
    elected = unified(piece)
    mask = piece.tau(index) * elected > 0
    return Code(elected * mask * statistics, bits=len(mask), shared=size_of(elected))
