"""Training objectives: the interface, and cross-entropy with label smoothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from tangent_arithmetic.runtime.registry import Registry
from tangent_arithmetic.training.recipe import Recipe

if TYPE_CHECKING:
    from jaxtyping import Float


class Objective(Protocol):
    """A loss to minimise; subclasses without state define `loss` alone."""

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], step: int
    ) -> Float[Tensor, " batch"] | Float[Tensor, ""]:
        """The loss of each image of a batch, or their mean.

        Args:
            model: maps images to logits, shape (batch, classes).
            batch: images and labels, on the model's device.
            step: the optimizer step, from 0.
        """
        ...

    def state_dict(self) -> Mapping[str, Tensor]:
        """The tensors that an exact resume needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> object:
        """Restores the tensors of `state_dict`."""
        return None


OBJECTIVES: Registry[Callable[[Recipe], Objective]] = Registry("objective")


class CrossEntropy(Objective):
    r"""\(-\sum_c q_c \log p_c\), \(q = (1 - \epsilon)\, \mathrm{onehot}(y) + \epsilon / C\).

    Args:
        label_smoothing: epsilon, in [0, 1].

    Source: Szegedy et al., "Rethinking the Inception Architecture", section 7, arXiv:1512.00567.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], step: int
    ) -> Float[Tensor, " batch"]:
        """The loss of each image."""
        images, labels = batch
        return F.cross_entropy(
            model(images), labels, reduction="none", label_smoothing=self.label_smoothing
        )


@OBJECTIVES.register("cross_entropy")
def cross_entropy(recipe: Recipe) -> CrossEntropy:
    """Cross-entropy with the recipe's label smoothing."""
    return CrossEntropy(recipe.ls)
