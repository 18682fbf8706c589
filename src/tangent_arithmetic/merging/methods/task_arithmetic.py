r"""Task arithmetic: the pre-trained model plus the scaled sum of the task vectors."""

from __future__ import annotations

from torch import Tensor

from tangent_arithmetic.merging.registry import Piece, merging_method


@merging_method("task_arithmetic", source="arXiv:2212.04089")
def task_arithmetic(piece: Piece, *, scaling_factor: float = 0.3) -> Tensor:
    r"""\(\theta = \theta_0 + \lambda \sum_t (\theta_t - \theta_0)\).

    Args:
        piece: one piece of every model.
        scaling_factor: lambda.

    Source: Ilharco et al., "Editing Models with Task Arithmetic", arXiv:2212.04089, section 2.
    """
    taus = piece.taus()
    total = next(taus)
    for tau in taus:
        total += tau
    return total.mul_(scaling_factor).add_(piece.base)
