"""No merging: a copy of the pre-trained model, or of the first one."""

from __future__ import annotations

from torch import Tensor

from tangent_arithmetic.merging.registry import Piece, merging_method


@merging_method("dummy", source="none", needs_pretrained=False, ordered=True)
def dummy(piece: Piece) -> Tensor:
    r"""\(\theta = \theta_0\), or \(\theta_1\) without a pre-trained model."""
    return piece.thetas[0].clone()
