r"""BitDelta: the sign of each weight, and one scale per tensor."""

from __future__ import annotations

import torch

from tangent_arithmetic.merging.compressing import Code, compression, width_of
from tangent_arithmetic.merging.registry import Piece


@compression("bitdelta", source="arXiv:2402.10193", whole=True)
def bitdelta(piece: Piece, index: int) -> Code:
    r"""\(\hat\tau_t = \alpha\, \operatorname{sign}(\tau_t)\), the sign of 0 being -1, by tensor.

    \(\alpha = \frac{1}{n} \sum |\tau_t|\), the scale with the least squared error, is stored as one
    number, the signs with 1 bit a weight. The paper compresses the linear layers of the blocks
    alone, and then trains the scales by distillation on text; neither is done here.

    Args:
        piece: one tensor of every model.
        index: t.

    Source: Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit", arXiv:2402.10193.
    """
    tau = piece.tau(index)
    scale = tau.abs().mean()
    signed = torch.where(tau > 0, scale, -scale)
    return Code(signed, bits=len(tau) + width_of(piece))
