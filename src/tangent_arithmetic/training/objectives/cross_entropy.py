"""Cross-entropy with label smoothing."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from tangent_arithmetic.training.objectives.base import OBJECTIVES, Objective
from tangent_arithmetic.training.recipe import Recipe


class CrossEntropy(Objective):
    r"""\(-\sum_c q_c \log p_c\), \(q = (1 - \epsilon)\, \mathrm{onehot}(y) + \epsilon / C\).

    Args:
        label_smoothing: epsilon, in [0, 1].

    Source: Szegedy et al., "Rethinking the Inception Architecture", section 7, arXiv:1512.00567.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], step: int) -> Tensor:
        """One loss an image, shape (batch,)."""
        images, labels = batch
        logits = model(images)
        return F.cross_entropy(
            logits, labels, reduction="none", label_smoothing=self.label_smoothing
        )


@OBJECTIVES.register("cross_entropy")
def cross_entropy(recipe: Recipe) -> CrossEntropy:
    """Cross-entropy with the recipe's label smoothing."""
    return CrossEntropy(recipe.ls)
