r"""The mean of the models."""

from __future__ import annotations

from torch import Tensor

from tangent_arithmetic.merging.registry import Piece, merging_method


@merging_method("simple_average", source="arXiv:2203.05482", needs_pretrained=False)
def simple_average(piece: Piece) -> Tensor:
    r"""\(\theta = \frac{1}{T} \sum_t \theta_t\), without the pre-trained model.

    Source: Wortsman et al., "Model soups", arXiv:2203.05482, section 2.
    """
    total = piece.thetas[0].clone()
    for theta in piece.thetas[1:]:
        total += theta
    return total.div_(len(piece.thetas))
